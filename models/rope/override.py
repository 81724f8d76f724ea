"""Replaces the rotation of a file, for experiments: ``load(rope=...)`` and ``--rope``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from ..config import ModelConfig
from ..hyperparameters import LARGEST_INTEGER
from .huggingface import TYPES
from .spec import KINDS, LongRope, RopeError, RopeSpec, Yarn, check, check_positive

ALIASES = {
    "rope_type": "kind",
    "type": "kind",
    "rope_theta": "base",
    "original_max_position_embeddings": "original_context",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
"""Names in a Hugging Face config -> ours; both are accepted."""

COMMON = ("kind", "base", "rotary_dim", "partial_rotary_factor")


def override_rope(config: ModelConfig, given: Mapping[str, Any] | str) -> ModelConfig:
    """``config`` with another rotation, and with the context that its scaling reaches.

    Args:
        config: the file's.
        given: the changes, as a mapping or as text (``kind=yarn,factor=4``, or a JSON object). Another ``kind`` than
            the file's replaces its scaling, GGUF's ``rope_freqs`` included. Without ``kind``, or with the file's, the
            given parameters are changed and the others stay. The keys are ``kind``, ``base``, ``rotary_dim`` or
            ``partial_rotary_factor``, and the parameters of the kind (``models/rope/spec.py``), under our names or
            Hugging Face's. ``original_context`` defaults to the context that the model was trained for: the one that
            the file's YaRN or LongRoPE scaling starts from, else the file's context. ``local_rope`` stays as it is.

    Raises:
        RopeError: an unknown kind or key, a missing one, or a number out of range.
    """
    values = _canonical(parse_rope(given) if isinstance(given, str) else given)
    old = config.rope
    named = values.pop("kind", None)
    kind = old.kind if named is None else TYPES.get(str(named), str(named))
    check(kind in KINDS, f"rope kind {named!r}", f"the kinds are {', '.join(KINDS)}", "Name one of these")
    scaling_class = KINDS[kind]
    defaults = {field.name: field.default for field in fields(scaling_class)}
    allowed = ", ".join((*COMMON, *defaults))
    for key in values:
        found, rule = f"rope key {key!r}", f"the keys of kind {kind!r} are {allowed}"
        check(key in COMMON or key in defaults, found, rule, "Name one of these, or another kind")

    spec = {
        "base": values.pop("base", old.base),
        "rotary_dim": _rotary_dim(values, old),
        "frequency_divisors": old.frequency_divisors if named is None else None,
    }
    trained = _trained_context(config)
    if kind == old.kind:
        scaling = replace(old.scaling, **values)
    else:
        if "original_context" in defaults:
            values.setdefault("original_context", trained)
        missing = [name for name, default in defaults.items() if default is MISSING and name not in values]
        rule = f"rope kind {kind!r} needs {', '.join(missing)}"
        check(not missing, f"no {', '.join(missing)} in rope", rule, "Give a value")
        scaling = scaling_class(**values)
    reached = min(max(1, int(scaling.reach(trained))), LARGEST_INTEGER)
    if kind == old.kind:
        reached = max(reached, config.context_length)
    rope = RopeSpec(head_dim=old.head_dim, scaling=scaling, **spec)
    return replace(config, rope=rope, context_length=reached)


def parse_rope(text: str) -> dict[str, Any]:
    """``kind=yarn,factor=4`` or a JSON object, as a mapping. Raises RopeError for anything else."""
    rule, remedy = "it is KEY=VALUE,... or a JSON object", "Write it like kind=yarn,factor=4"
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise RopeError(f"rope {text!r}", rule=rule, remedy=remedy) from error
    pairs = [part.partition("=") for part in text.split(",")]
    check(all(key.strip() and equals for key, equals, _ in pairs), f"rope {text!r}", rule, remedy)
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    """``text`` as a number or truth value if it is one, else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` under our names, with lists as tuples and without None."""
    check(isinstance(given, Mapping), f"rope {given!r}", "it is a mapping, such as {'kind': 'yarn', 'factor': 4}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
        value = tuple(value) if isinstance(value, list) else value
        name = ALIASES.get(key, key)
        both = f"rope keys {name!r} twice, as {values.get(name)!r} and {value!r}"
        check(name not in values or values[name] == value, both, "each is given once", "Remove one")
        values[name] = value
    return values


def _rotary_dim(values: dict[str, Any], old: RopeSpec) -> int:
    """How many dimensions of a head rotate; removes its keys from ``values``."""
    count, part = values.pop("rotary_dim", None), values.pop("partial_rotary_factor", None)
    check(count is None or part is None, "rope keys rotary_dim and partial_rotary_factor", "they state the same number")
    if part is not None:
        check_positive("partial_rotary_factor", part)
        return int(old.head_dim * part)
    check(count is None or type(count) is int, f"rotary_dim {count!r}", "it is a whole number")
    return old.rotary_dim if count is None else count


def _trained_context(config: ModelConfig) -> int:
    """The context that the model was trained for. YaRN and LongRoPE extend it; Llama 3.1's scaling was trained with."""
    scaling = config.rope.scaling
    return int(scaling.original_context) if isinstance(scaling, Yarn | LongRope) else config.context_length
