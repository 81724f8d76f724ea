"""The rotary embedding that a checkpoint describes.

The keys of a GGUF file are read as llama.cpp reads them. The parameters of a Hugging Face folder say more than GGUF's
keys can; the loader passes them on as a mapping under the key ``rope.huggingface``, which no file can hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..hyperparameters import Hyperparameters
from .huggingface import rope_from_hf
from .spec import Linear, LongRope, RopeSpec, Scaling, Yarn


def read_rope(
    keys: Hyperparameters,
    *,
    head_dim: int,
    context_length: int,
    divisors: tuple[float, ...] | None = None,
    short_factors: tuple[float, ...] | None = None,
    long_factors: tuple[float, ...] | None = None,
) -> RopeSpec:
    """The rotation that a file's ``rope.*`` keys and factor tensors describe.

    Args:
        keys: the architecture's hyperparameters.
        head_dim: dimensions of a head; ``rope.dimension_count`` of them rotate.
        context_length: the original context, if the file names none.
        divisors: ``rope_freqs.weight``, one per pair: Llama 3.1's scaling, as the converter computed it.
        short_factors, long_factors: ``rope_factors_short.weight`` and ``rope_factors_long.weight`` (LongRoPE).

    Raises:
        ConfigError: an unknown scaling type, or factors that contradict it.
        RopeError: numbers that describe no rotation.
    """
    if (parameters := keys.mapping("rope.huggingface")) is not None:
        full, _ = _by_layer_type(parameters)
        return rope_from_hf(**full, head_dim=head_dim, max_position_embeddings=context_length)
    common = {
        "head_dim": head_dim,
        "rotary_dim": keys.integer("rope.dimension_count", head_dim),
        "base": keys.real("rope.freq_base", 10_000.0),
    }
    older = keys.real("rope.scale_linear", 0.0, positive=False)
    factor = keys.real("rope.scaling.factor", older, positive=False) or 1.0  # 0 is llama.cpp's "not given"
    original_context = keys.integer("rope.scaling.original_context_length", context_length)
    magnitude = keys.real("rope.scaling.attn_factor", None)
    # llama.cpp takes a file without a type as linear. Phi-3's files have no type either, but factor tensors.
    sets = [factors for factors in (short_factors, long_factors) if factors is not None]
    kind = keys.text("rope.scaling.type", "longrope" if sets else "linear")
    if len(sets) != (2 if kind == "longrope" else 0) or (sets and divisors is not None):
        keys.refuse(
            "rope.scaling.type",
            f"rope.scaling.type {kind!r} with {len(sets)} of the tensors rope_factors_short and rope_factors_long"
            + (" and with rope_freqs" if divisors is not None else ""),
            "longrope needs both factor tensors and no other; no other type reads them",
            "Convert the checkpoint again",
        )
    if kind == "longrope" and factor != 1.0:
        keys.refuse(
            "rope.scaling.factor",
            f"rope.scaling.factor {factor} with scaling type 'longrope'",
            "longrope divides each pair by a factor of its own, not by a common one",
            "Convert the checkpoint again",
        )
    if kind not in ("none", "linear", "yarn", "longrope"):
        keys.refuse(
            "rope.scaling.type",
            f"rope.scaling.type {kind!r}",
            "GGUF's types are none, linear, yarn and longrope",
            "The file is newer than this release, or damaged",
        )
    yarn_keys = _yarn_keys(keys)
    given = None if magnitude == 1.0 else magnitude
    scaling = Scaling(attention_factor=given)
    if short_factors is not None and long_factors is not None:
        scaling = LongRope(
            factor=max(1.0, context_length / original_context),
            original_context=original_context,
            attention_factor=magnitude,
            short_factors=short_factors,
            long_factors=long_factors,
        )
    elif kind == "yarn":
        if "yarn_log_multiplier" in yarn_keys:
            keys.refuse(
                "rope.scaling.yarn_log_multiplier",
                f"rope.scaling.yarn_log_multiplier = {yarn_keys['yarn_log_multiplier']:g}",
                "it is mscale_all_dim in some architectures' files and a tenth of it in others', and in none of these",
                "Convert the checkpoint again with a current converter",
            )
        scaling = _yarn(factor, original_context, magnitude, yarn_keys)
    elif kind == "linear" and factor != 1.0:
        scaling = Linear(factor=factor, attention_factor=given)
    if yarn_keys:
        shown = ", ".join(f"rope.scaling.{key} = {value:g}" for key, value in yarn_keys.items())
        warnings.warn(f"{shown} in the file changes nothing with scaling type {kind!r}, as in llama.cpp", stacklevel=2)
    return RopeSpec(**common, scaling=scaling, frequency_divisors=divisors)


YARN_DEFAULTS = {
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_log_multiplier": 0.0,
}
"""llama.cpp's. A negative yarn_ext_factor means the default."""


def _yarn_keys(keys: Hyperparameters) -> dict[str, float]:
    """The file's ``rope.scaling.yarn_*`` that differ from their defaults."""
    found = {}
    for key, default in YARN_DEFAULTS.items():
        value = keys.real(f"rope.scaling.{key}", default, positive="beta" in key)
        if key == "yarn_ext_factor" and value < 0:
            value = default
        if value != default:
            found[key] = value
    return found


def _yarn(factor: float, original_context: int, magnitude: float | None, yarn_keys: dict[str, float]) -> Yarn:
    """YaRN as llama.cpp computes it; removes the keys that have an effect from ``yarn_keys``.

    llama.cpp's kernels imply the factor 1 + 0.1 ln(factor), and multiply it by the file's attn_factor. yarn_attn_factor
    replaces the implied factor if yarn_ext_factor is 0, and otherwise has no effect: under this name, converters write
    both transformers' attention_factor and other tools' attn_factor, which mean different things.
    """
    extrapolation = yarn_keys.pop("yarn_ext_factor", 1.0)
    yarn = Yarn(
        factor=factor,
        original_context=original_context,
        beta_fast=yarn_keys.pop("yarn_beta_fast", 32.0),
        beta_slow=yarn_keys.pop("yarn_beta_slow", 1.0),
        extrapolation_factor=extrapolation,
    )
    implied = yarn_keys.pop("yarn_attn_factor", 1.0) if extrapolation == 0 else yarn.derived_attention_factor()
    given = implied * (magnitude or 1.0)
    return yarn if given == yarn.derived_attention_factor() else replace(yarn, attention_factor=given)


def read_local_rope(
    keys: Hyperparameters, rope: RopeSpec, *, context_length: int, base: float | None = None
) -> RopeSpec | None:
    """The rotation of layers with a sliding window; None if it is ``rope``, that of the other layers.

    config.json states it as the ``rope_parameters`` of ``sliding_attention``. Files of both formats may state the base
    of an unscaled rotation, ``rope.freq_base_swa``. ``base`` is used if the file states neither.
    """
    _, local = _by_layer_type(keys.mapping("rope.huggingface") or {})
    if local is not None:
        return rope_from_hf(**local, head_dim=rope.head_dim, max_position_embeddings=context_length)
    base = keys.real("rope.freq_base_swa", base)
    return None if base is None else RopeSpec(head_dim=rope.head_dim, rotary_dim=rope.rotary_dim, base=base)


def _by_layer_type(parameters: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """``rope_from_hf``'s arguments for layers that see every key, and for those with a window, None if the same."""
    given = parameters.get("rope_parameters")
    if not isinstance(given, Mapping) or set(given) != {"full_attention", "sliding_attention"}:
        return parameters, None
    full, local = ({**parameters, "rope_parameters": given[kind]} for kind in ("full_attention", "sliding_attention"))
    return full, local
