"""The slots of the next tokens of 1 and 64 sequences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import cases
from cases import Case
from model_calls import BATCHES, INT32, Call, Model, empty
from rooflama import kernels

PAGE_SIZE, PAGES = 64, 128


def measured() -> Iterator[Case]:
    for num_seqs in (1, 64):
        lengths = torch.zeros(num_seqs, dtype=torch.int32, device=cases.CUDA)
        limits = torch.full_like(lengths, 2**30)
        table = torch.zeros(num_seqs, PAGES, dtype=torch.int32, device=cases.CUDA)
        call = partial(kernels.next_slots, lengths, limits, table, PAGE_SIZE, PAGE_SIZE * PAGES)
        yield Case(f"next_slots [{num_seqs}]", 32 * num_seqs, 0, {"rooflama": [call] * 8})


def calls(model: Model, everything: bool) -> Iterator[Call]:
    for num_seqs in BATCHES:
        tensors = (empty(num_seqs, dtype=INT32), empty(num_seqs, dtype=INT32), empty(num_seqs, PAGES, dtype=INT32))
        yield Call(kernels.next_slots, f"{num_seqs} sequences", (*tensors, PAGE_SIZE, PAGE_SIZE * PAGES))
