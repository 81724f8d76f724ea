"""Sums over two ranks. What crosses the link is measured by ``tensor_parallel.py``, on two GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cases
from cases import BF16, Case
from model_calls import INT32, Call, Model, empty
from rooflama import kernels
from rooflama.kernels.all_reduce import BLOCK, Peers, most_bytes

RANKS = 2


def measured() -> Iterator[Case]:
    for tokens in (1, 2048):
        num_bytes = (RANKS + 2) * 2 * tokens * 8192
        parts = [
            torch.randn(RANKS + 1, tokens, 8192, device=cases.CUDA, dtype=BF16) for _ in range(cases.copies(num_bytes))
        ]
        yield Case(
            f"sum of {RANKS} parts and a residual [{tokens}, 8192]", num_bytes, 0,
            {
                "rooflama": [lambda p=p: kernels.sum_parts(p[:RANKS], None, p[RANKS]) for p in parts],
                "torch": [lambda p=p: p.sum(0) for p in parts],
            },
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    hidden = model.hidden_size
    residual, bias = empty(8, hidden), empty(hidden)
    yield Call(kernels.sum_parts, f"{RANKS} ranks", (empty(RANKS, 8, hidden), None, residual))
    yield Call(kernels.one_shot_sum, f"{RANKS} ranks", (empty(8, hidden), peers(RANKS), None, residual))
    if everything:
        yield Call(kernels.sum_parts, "8 ranks, bias", (empty(8, 8, hidden), bias, residual))
        yield Call(kernels.one_shot_sum, "8 ranks, bias", (empty(8, hidden), peers(8), bias, residual))


def peers(ranks: int) -> Peers:
    capacity = most_bytes(ranks, None)["ONE_SHOT_BYTES"] // 2
    blocks = capacity // BLOCK
    slots, flags = ([empty(*shape, dtype=dtype) for _ in range(ranks)] for shape, dtype in (
        ((2, capacity), BF16), ((2, blocks, ranks), INT32),
    ))  # fmt: skip
    return Peers(tuple(slots), tuple(flags), empty(blocks, dtype=INT32), 0)
