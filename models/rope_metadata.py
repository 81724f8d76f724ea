"""The rotary embedding that a checkpoint describes.

A GGUF file's keys are read as llama.cpp reads them. A Hugging Face folder's own parameters come whole under one key,
``rope.huggingface``, which no file can hold: they say more than GGUF's keys can.
"""

from __future__ import annotations

import math

from .metadata import Hyperparameters
from .rope import Linear, LongRope, RopeSpec, Yarn


def read_rope(
    keys: Hyperparameters,
    *,
    head_dim: int,
    context_length: int,
    divisors: tuple[float, ...] | None = None,
    short_factors: tuple[float, ...] | None = None,
    long_factors: tuple[float, ...] | None = None,
) -> RopeSpec:
    """RopeSpec from ``rope.*`` keys and the factor tensors of a file.

    Args:
        keys: the architecture's hyperparameters.
        head_dim: dimensions of a head; ``rope.dimension_count`` of them rotate.
        context_length: the original context where the file names none.
        divisors: ``rope_freqs.weight``, one a pair (Llama 3.1's scaling, already worked out by the converter).
        short_factors, long_factors: ``rope_factors_short.weight`` and ``rope_factors_long.weight`` (LongRoPE).

    Raises:
        ConfigError: an unknown scaling type, or factors that contradict it.
        RopeError: numbers that describe no rotation.
    """
    if (parameters := keys.mapping("rope.huggingface")) is not None:
        return RopeSpec.from_hf(**parameters, head_dim=head_dim, max_position_embeddings=context_length)
    common = {
        "head_dim": head_dim,
        "rotary_dim": keys.integer("rope.dimension_count", head_dim),
        "base": keys.real("rope.freq_base", 10_000.0),
    }
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    original_context = keys.integer("rope.scaling.original_context_length", context_length)
    magnitude = keys.real("rope.scaling.attn_factor", None)
    # A file without a type is linear to llama.cpp; Phi-3's files name no type and are told by their factor tensors.
    sets = [factors for factors in (short_factors, long_factors) if factors is not None]
    kind = keys.text("rope.scaling.type", "longrope" if sets else "linear")
    if len(sets) != (2 if kind == "longrope" else 0) or (sets and divisors is not None):
        keys.refuse(
            "rope.scaling.type",
            f"rope.scaling.type {kind!r} with {len(sets)} of the tensors rope_factors_short and rope_factors_long"
            + (" and with rope_freqs" if divisors is not None else ""),
            "longrope needs both factor tensors and no other, and nothing else reads them",
            "Convert the checkpoint again",
        )
    if kind == "longrope" and factor != 1.0:
        keys.refuse(
            "rope.scaling.factor",
            f"rope.scaling.factor {factor} with scaling type 'longrope'",
            "longrope divides each pair by its own factor, and by no common one",
            "Convert the checkpoint again",
        )
    if short_factors is not None and long_factors is not None:
        scaling = LongRope(
            factor=max(1.0, context_length / original_context),
            original_context=original_context,
            attention_factor=magnitude,
            short_factors=short_factors,
            long_factors=long_factors,
        )
        return RopeSpec(**common, scaling=scaling)
    if kind == "yarn":
        # llama.cpp's kernels imply 1 + 0.1 ln(factor) and multiply the file's attn_factor on top.
        implied = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        yarn = Yarn(
            factor=factor,
            original_context=original_context,
            attention_factor=implied * (magnitude or 1.0),
            beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
        )
        return RopeSpec(**common, scaling=yarn, frequency_divisors=divisors)
    if kind not in ("none", "linear"):
        keys.refuse(
            "rope.scaling.type",
            f"rope.scaling.type {kind!r}",
            "GGUF's types are none, linear, yarn and longrope",
            "The file is newer than this release, or damaged",
        )
    if magnitude not in (None, 1.0):
        keys.refuse(
            "rope.scaling.attn_factor",
            f"rope.scaling.attn_factor {magnitude} with scaling type {kind!r}",
            "only yarn and longrope scale the attention",
            "Convert the checkpoint again, naming its scaling type",
        )
    if kind == "linear" and factor != 1.0:
        return RopeSpec(**common, scaling=Linear(factor=factor), frequency_divisors=divisors)
    return RopeSpec(**common, frequency_divisors=divisors)
