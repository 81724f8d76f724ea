"""What the tests of sampling draw: mixtures of parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .strategies import DEVICE


def column(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def randomness(rng: np.random.Generator, num_seqs: int) -> dict[str, Tensor]:
    return {
        "seeds": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, num_seqs)).to(DEVICE),
        "steps": torch.from_numpy(rng.integers(0, 2**40, num_seqs)).to(DEVICE),
    }


def random_parameters(rng: np.random.Generator, num_seqs: int, vocab: int) -> dict[str, Tensor]:
    """A mixture of greedy and drawing rows, each filter on for about half of them."""

    def mixed(values, off):
        return np.where(rng.random(num_seqs) < 0.5, values, off)

    return {
        "temperature": column(
            mixed(rng.uniform(0.3, 2.0, num_seqs), 0.8) * (rng.random(num_seqs) < 0.8), torch.float32
        ),
        "top_k": column(mixed(rng.integers(1, vocab + 3, num_seqs), 0), torch.int32),
        "top_p": column(mixed(rng.uniform(0.05, 1.0, num_seqs), 1.0), torch.float32),
        "min_p": column(mixed(rng.uniform(0.0, 0.5, num_seqs), 0.0), torch.float32),
        **randomness(rng, num_seqs),
    }
