"""What the tests of paged K/V build: poisoned pages, and tables, lengths and slots between poison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .strategies import DEVICE, guarded

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}


def poisoned_pages(shape: Sequence[int], dtype: torch.dtype) -> list[Any]:
    """k_pages, v_pages, k_scale, v_scale of NaN (int8: -128, which no writer stores); no scales for float pages."""
    poison = -128 if dtype == torch.int8 else float("nan")
    pages = [torch.full(shape, poison, device=DEVICE).to(dtype) for _ in range(2)]
    return pages + [torch.full(shape[:3], float("nan"), device=DEVICE) if dtype in LIMITS else None for _ in range(2)]


def random_slots(rng: np.random.Generator, num_tokens: int, num_slots: int) -> Tensor:
    return guarded(torch.from_numpy(rng.permutation(num_slots)[:num_tokens]).to(DEVICE))[0]


def ragged_table(
    rng: np.random.Generator, seq_lens: Sequence[int], page_size: int, num_pages: int
) -> tuple[Tensor, Tensor]:
    """A block table of distinct random pages, and the lengths; columns past a sequence's end name page 2^30."""
    pages = iter(rng.permutation(num_pages))
    columns = max([-(-n // page_size) for n in seq_lens], default=0) + 1
    table = np.full((len(seq_lens), columns), 2**30, np.int32)
    for row, length in zip(table, seq_lens, strict=True):
        for column in range(-(-length // page_size)):
            row[column] = next(pages)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    return guarded(torch.from_numpy(table).to(DEVICE))[0], guarded(lengths)[0]


def slots_of(table: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """The slots of all keys, one sequence after the other."""
    return torch.cat(
        [
            row[torch.arange(n, device=DEVICE) // page_size].long() * page_size
            + torch.arange(n, device=DEVICE) % page_size
            for row, n in zip(table, seq_lens.tolist(), strict=True)
        ]
    )
