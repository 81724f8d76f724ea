"""Triton's interpreter, with two things that the tests rely on: an order of sums, and a watch over memory.

On a GPU an element of a dot depends only on its own row and column. The interpreter passes the tile to BLAS, whose
order of summation may depend on the element's place in the tile. Whether it does depends on the processor: OpenBLAS's
kernels for AVX2 do.

Under compute-sanitizer a GPU reports a load beyond the ends of a tensor. The interpreter reads whatever is there, and
no result shows it if a later mask drops the value.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_extents: list[tuple[int, int]] = []  # first address and the one past the end of each tensor of the running launch


def ordered_dot(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """a @ b, [m, k] @ [k, n], each element summed from k = 0 upwards."""
    return np.einsum("mk,kn->mn", np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype))


def use_ordered_dot() -> None:
    """Give the interpreter's tl.dot ``ordered_dot``, for this process."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(ordered_dot(a.data, b.data, d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def watch_memory() -> None:
    """Refuse loads and stores outside the tensors that a launch was given, for this process."""
    launch, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def watched_launch(self, *arguments, **named):
        _extents[:] = [extent(tensor) for tensor in tensors_in((*arguments, *named.values())) if tensor.numel()]
        return launch(self, *arguments, **named)

    def watched_load(self, ptrs, mask, *others):
        check_addresses(ptrs, mask)
        return load(self, ptrs, mask, *others)

    def watched_store(self, ptrs, value, mask, *others):
        check_addresses(ptrs, mask)
        return store(self, ptrs, value, mask, *others)

    GridExecutor.__call__ = watched_launch
    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensor itself, or those of a tuple, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_addresses(ptrs: TensorHandle, mask: TensorHandle) -> None:
    """All addresses of one load or store lie in one tensor."""
    addresses = ptrs.data[mask.data]
    if addresses.size:
        first, last = int(addresses.min()), int(addresses.max())
        end = last + max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        assert any(start <= first and end <= stop for start, stop in _extents), "an access beyond the tensors' ends"
