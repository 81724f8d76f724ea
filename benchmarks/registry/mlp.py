"""Gated activations, at one token and at 4,096."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import cases
from cases import BF16, Case
from model_calls import Call, Model, empty
from rooflama import kernels


def measured() -> Iterator[Case]:
    for tokens in (1, 4096):
        num_bytes = 6 * tokens * 14336
        gates = [torch.randn(tokens, 2 * 14336, device=cases.CUDA, dtype=BF16) for _ in range(cases.copies(num_bytes))]
        yield Case(
            f"swiglu [{tokens}, 14336]", num_bytes, 0,
            {
                "rooflama": [lambda g=g: kernels.swiglu(*g.chunk(2, -1)) for g in gates],
                "torch": [lambda g=g: F.silu(g[:, :14336]) * g[:, 14336:] for g in gates],
            },
        )  # fmt: skip
        yield Case(
            f"geglu [{tokens}, 14336]", num_bytes, 0,
            {
                "rooflama": [lambda g=g: kernels.geglu(*g.chunk(2, -1)) for g in gates],
                "torch": [lambda g=g: F.gelu(g[:, :14336], approximate="tanh") * g[:, 14336:] for g in gates],
            },
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    gate, up = empty(8, 2 * model.intermediate_size).chunk(2, dim=-1)
    yield Call(kernels.swiglu, "", (gate, up))
    yield Call(kernels.geglu, "", (gate, up))
