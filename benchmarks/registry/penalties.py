"""Penalties on the logits of a vocabulary of 128,256."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cases
from cases import Case
from model_calls import BATCHES, F32, INT32, Call, Model, empty
from rooflama import kernels


def measured() -> Iterator[Case]:
    vocab = 128256
    for num_seqs in (1, 64):
        num_bytes = 3 * 4 * num_seqs * vocab  # logits in and out, and counts
        factors = [torch.full((num_seqs,), value, device=cases.CUDA) for value in (1.1, 0.1, 0.1)]
        sets = [
            (
                torch.randn(num_seqs, vocab, device=cases.CUDA),
                torch.randint(3, (num_seqs, vocab), device=cases.CUDA, dtype=torch.int32),
            )
            for _ in range(cases.copies(num_bytes))
        ]
        yield Case(
            f"penalise [{num_seqs}, {vocab}]", num_bytes, 0,
            {"rooflama": [lambda s=s, f=factors: kernels.penalise(*s, *f) for s in sets]},
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    for num_seqs in BATCHES:
        logits, counts = empty(num_seqs, model.vocab_size, dtype=F32), empty(num_seqs, model.vocab_size, dtype=INT32)
        factors = [empty(num_seqs, dtype=F32) for _ in range(3)]
        yield Call(kernels.penalise, f"{num_seqs} sequences", (logits, counts, *factors))
