"""Choosing a token from a vocabulary of 128,256."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cases
from cases import Case
from model_calls import BATCHES, F32, INT32, INT64, Call, Model, empty
from rooflama import kernels


def measured() -> Iterator[Case]:
    for num_seqs in (1, 64):
        sets = [torch.randn(num_seqs, 128256, device=cases.CUDA) for _ in range(cases.copies(4 * num_seqs * 128256))]
        integers = {name: torch.zeros(num_seqs, dtype=torch.int64, device=cases.CUDA) for name in ("seeds", "steps")}
        floats = {
            name: torch.full((num_seqs,), value, device=cases.CUDA)
            for name, value in (("temperature", 0.8), ("top_p", 0.95), ("min_p", 0.05))
        }
        filters = {**integers, **floats, "top_k": torch.full((num_seqs,), 40, dtype=torch.int32, device=cases.CUDA)}
        yield Case(
            f"greedy [{num_seqs}, 128256]", 4 * num_seqs * 128256, 0,
            {
                "rooflama": [lambda x=x: kernels.sample(x) for x in sets],
                "torch": [lambda x=x: x.argmax(-1) for x in sets],
            },
        )  # fmt: skip
        yield Case(
            f"temperature, top-k, top-p, min-p [{num_seqs}, 128256]", 4 * num_seqs * 128256, 0,
            {"rooflama": [lambda x=x, f=filters: kernels.sample(x, **f) for x in sets]},
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    for num_seqs in BATCHES:
        logits = empty(num_seqs, model.vocab_size, dtype=F32)
        drawn = {"temperature": empty(num_seqs, dtype=F32)}
        drawn |= {name: empty(num_seqs, dtype=INT64) for name in ("seeds", "steps")}
        narrowed = {name: empty(num_seqs, dtype=F32) for name in ("top_p", "min_p")}
        narrowed |= {"top_k": empty(num_seqs, dtype=INT32)}
        yield Call(kernels.sample, f"greedy {num_seqs} sequences", (logits,))
        yield Call(kernels.sample, f"drawn {num_seqs} sequences", (logits,), drawn)
        if everything:
            yield Call(kernels.sample, f"narrowed {num_seqs} sequences", (logits,), {**drawn, **narrowed})
