"""Triton's interpreter, with the one thing about tl.dot that tests of single bits rely on.

On a GPU an element of a dot depends on its own row and column alone. The interpreter hands the tile to BLAS, which may
sum an element in another order because of where it stands in the tile; whether it does depends on the processor
(OpenBLAS's kernels for AVX2 do).
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def ordered_dot(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """a @ b, [m, k] @ [k, n], each element summed from k = 0 upwards."""
    return np.einsum("mk,kn->mn", np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype))


def use_ordered_dot() -> None:
    """Give the interpreter's tl.dot ``ordered_dot``, for this process."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(ordered_dot(a.data, b.data, d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
