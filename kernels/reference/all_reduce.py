"""Sums over ranks, each of which holds one addend."""

from typing import Any

import numpy as np


def sum_parts(parts: np.ndarray, bias: np.ndarray | None = None, residual: np.ndarray | None = None) -> np.ndarray:
    """parts [ranks, tokens, columns] -> [tokens, columns]: ((part 0 + part 1) + ...) + bias + residual."""
    total = np.zeros(parts.shape[1:], np.result_type(parts.dtype, np.float32))
    for addend in [*parts, *(more for more in (bias, residual) if more is not None)]:
        total = total + addend
    return total


def one_shot_sum(
    addend: np.ndarray, peers: Any, bias: np.ndarray | None = None, residual: np.ndarray | None = None
) -> np.ndarray:
    """``sum_parts`` of this rank's addend [tokens, columns] and of the peers', which stand in their slots."""
    slot = (peers.launches[0] + 1) % 2
    parts = [slots[slot, : addend.size].reshape(addend.shape) for slots in peers.slots]
    parts[peers.rank] = addend
    return sum_parts(np.stack(parts), bias, residual)
