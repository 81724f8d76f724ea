"""What the property tests draw: sizes and a seed. The arrays are made from the seed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter computes bfloat16 wrongly, so only a GPU draws it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)


def normal(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal data on DEVICE, already rounded to ``dtype`` so that every implementation sees the same numbers."""
    return torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype=dtype, device=DEVICE)


def exact(tensor: Tensor) -> np.ndarray:
    """The tensor's values in float64, for the NumPy definition."""
    return tensor.detach().cpu().double().numpy()


GUARD = 512  # elements of poison on each side


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``tensor`` with poison before and after it, and the whole buffer for ``assert_guards_intact``.

    Poison is NaN for floats and the most negative number for integers: a read beyond the ends shows in the result.
    """
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    buffer = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
    buffer[GUARD:-GUARD] = tensor.reshape(-1)
    return buffer[GUARD:-GUARD].view(tensor.shape), buffer


def beyond_int32(values: Tensor) -> Tensor:
    """``values`` [3, ...] with row 2 more than 2^31 elements after row 0, by a stride that fits int32, as real ones do.

    On the CPU the storage is address space without memory behind it, but for the three rows.
    """
    row = values[0].numel()
    stride = 2**30 + 8
    if values.device.type == "cpu":
        zeros = np.memmap("/dev/zero", dtype=np.uint8, mode="c", shape=((2 * stride + row) * values.element_size(),))
        buffer = torch.from_numpy(zeros).view(values.dtype)
    else:
        buffer = values.new_empty(2 * stride + row)
    far = buffer.as_strided(values.shape, (stride, *values[:1].contiguous().stride()[1:]))
    far.copy_(values)
    return far
