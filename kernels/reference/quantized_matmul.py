"""Matrix product with quantised weights: out = x @ dequantize(weight).T (+ bias) (+ residual)."""

import numpy as np

from .dequantize import dequantize


def quantized_matmul(x, weight, bias=None, *, residual=None, batch_invariant: bool = False) -> np.ndarray:
    """x [num_tokens, columns], weight [rows, columns], bias [rows], residual [num_tokens, rows] -> [num_tokens, rows].

    ``batch_invariant`` fixes the order of the kernel's sums; the definition has one order only.
    """
    dtype = np.result_type(x.dtype, np.float32)
    out = x.astype(dtype, copy=False) @ dequantize(weight).astype(dtype, copy=False).T
    if bias is not None:
        out += bias.astype(dtype, copy=False)
    if residual is not None:
        out += residual.astype(dtype, copy=False)
    return out
