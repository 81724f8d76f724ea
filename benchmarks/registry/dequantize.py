"""A whole weight, dequantised."""

from __future__ import annotations

from collections.abc import Iterator

from cases import BF16, Case, random_weight
from model_calls import Call, Model
from rooflama import kernels


def measured() -> Iterator[Case]:
    for ggml_type in ("Q4_K", "Q6_K", "Q8_0"):
        weights = [random_weight(ggml_type, 14336, 4096) for _ in range(2)]
        yield Case(
            f"{ggml_type} [14336, 4096]", weights[0].nbytes + 2 * 14336 * 4096, 0,
            {"rooflama": [lambda w=w: kernels.dequantize(w, BF16) for w in weights]},
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    """None of its own: a quantised product of many tokens dequantises its weight."""
    return iter(())
