"""The rotary parameters of a Hugging Face config, as transformers reads them.

transformers' ``modeling_rope_utils`` defines the keys of each kind, and which of two values counts. It ignores every
other key, and so does this module, with a warning that names it. Among the ignored keys are ``attn_factor`` and
``extrapolation_factor``, which YaRN's authors and vLLM use, Hunyuan's ``alpha``, and Phi-3.5-MoE's ``short_mscale`` and
``long_mscale``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from rooflama.kernels.errors import shorten

from .spec import KINDS, RopeSpec, check, check_positive

KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        key: key
        for key in ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
    },
    "longrope": {
        "factor": "factor",
        "attention_factor": "attention_factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    },
    "llama3": {key: key for key in ("factor", "low_freq_factor", "high_freq_factor")},
}
"""Kind -> its keys in a config, and the field of its ``Scaling`` that each becomes."""

TYPES = {"su": "longrope"}
ZERO_IS_ABSENT = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
NO_EFFECT = ("finetuned",)  # says how the weights were trained, not how to rotate


def rope_from_hf(
    rope_parameters: Mapping[str, Any] | None,
    *,
    head_dim: int,
    max_position_embeddings: int,
    theta: float | None = None,
    partial_rotary_factor: float | None = None,
    original_max_position_embeddings: int | None = None,
) -> RopeSpec:
    """The rotation that a Hugging Face config describes.

    Args:
        rope_parameters: the config's ``rope_parameters`` (``rope_scaling`` in older files); None if it has none.
        head_dim: dimensions of a head.
        max_position_embeddings: the config's context length in tokens.
        theta, partial_rotary_factor: the config's ``rope_theta`` and ``partial_rotary_factor`` outside the dictionary;
            a value inside it counts first.
        original_max_position_embeddings: the same, but this outer value counts first.

    Warns:
        UserWarning: a key that transformers does not define for the kind, or two values of one number.

    Raises:
        RopeError: an unknown type, a missing key, parameters per layer type, or a number out of range.
    """
    check(isinstance(rope_parameters or {}, Mapping), f"RoPE parameters {rope_parameters!r}", "they are a mapping")
    given = {key: value for key, value in (rope_parameters or {}).items() if value is not None}
    kind = _kind(given)
    base = _one_of("rope_theta", given.pop("rope_theta", None), theta, 10_000.0)
    part = _one_of("partial_rotary_factor", given.pop("partial_rotary_factor", None), partial_rotary_factor, 1.0)
    values: dict[str, Any] = {
        field: tuple(given[key]) if isinstance(given[key], list | tuple) else given[key]
        for key, field in KEYS[kind].items()
        if key in given and not (given[key] == 0 and key in ZERO_IS_ABSENT)
    }
    read = {*KEYS[kind], *NO_EFFECT}
    required = {field.name: field.default is MISSING for field in fields(KINDS[kind])}
    if kind == "dynamic":  # transformers stretches beyond max_position_embeddings, whatever other keys say
        values["original_context"] = max_position_embeddings
    elif "original_context" in required:
        read.add("original_max_position_embeddings")
        inner, outer = given.get("original_max_position_embeddings"), original_max_position_embeddings
        original = _one_of("original_max_position_embeddings", outer or None, inner or None, max_position_embeddings)
        values["original_context"] = original
        if kind in ("yarn", "longrope"):
            values.setdefault("factor", max_position_embeddings / original)
    _warn_of_unread(kind, {key: value for key, value in given.items() if key not in read})
    missing = [field for field, needed in required.items() if needed and field not in values]
    check(not missing, f"no {', '.join(missing)} in the RoPE parameters", f"rope_type {kind!r} needs it")
    return RopeSpec(head_dim=head_dim, rotary_dim=int(head_dim * part), base=float(base), scaling=KINDS[kind](**values))


def _kind(given: dict[str, Any]) -> str:
    """The kind named by ``rope_type``, or by ``type`` in older files; both keys are removed from ``given``."""
    named = [
        TYPES.get(str(name), str(name)) for name in (given.pop("rope_type", None), given.pop("type", None)) if name
    ]
    kind = named[0] if named else "default"
    if len(set(named)) == 2:
        _warn(f"rope_type is {named[0]!r} and type is {named[1]!r}: rope_type counts, as in transformers")
    check(kind in KINDS, f"rope_type {kind!r}", f"the types are {', '.join(KINDS)}", "Add it to models/rope/spec.py")
    return kind


def _one_of(name: str, first: Any, second: Any, default: float) -> Any:
    """The first value that is given. Warns if both are given and differ."""
    given = [value for value in (first, second) if value is not None] or [default]
    for value in given:
        check_positive(name, value)
    if given[0] != given[-1]:
        _warn(f"{name} is {given[0]} in one place of the config and {given[1]} in another: {given[0]} counts, as in "
              "transformers")  # fmt: skip
    return given[0]


def _warn_of_unread(kind: str, unread: Mapping[str, Any]) -> None:
    for key, value in unread.items():
        check(
            not isinstance(value, Mapping),
            f"RoPE parameters under {key!r}",
            "all layers of a model have one rotation",
            "Use a model with one set of parameters",
        )
    if unread:
        shown = shorten(", ".join(f"{key} = {value!r}" for key, value in unread.items()))
        _warn(f"transformers defines no such keys for rope_type {kind!r}, and they change nothing: {shown}")


def _warn(message: str) -> None:
    warnings.warn(f"RoPE parameters: {message}", stacklevel=4)
