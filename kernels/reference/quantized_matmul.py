"""Matrix product with quantised weights: out = x @ dequantize(weight).T (+ bias) (+ residual)."""

import numpy as np

from .dequantize import dequantize
from .mlp import swiglu as gated
from .norm import rms_norm


def quantized_matmul(
    x,
    weight,
    bias=None,
    *,
    residual=None,
    norm_weight=None,
    eps: float = 0.0,
    swiglu: bool = False,
    batch_invariant: bool = False,
) -> np.ndarray:
    """x [num_tokens, columns], weight [rows, columns], bias [rows], residual [num_tokens, rows] -> [num_tokens, rows].

    With ``norm_weight`` [columns] x is normed first; with ``swiglu`` the result is silu(gate) * up of its two halves,
    [num_tokens, rows / 2]. ``batch_invariant`` fixes the order of the kernel's sums; the definition has one order only.
    """
    dtype = np.result_type(x.dtype, np.float32)
    x = x.astype(dtype, copy=False)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight.astype(dtype, copy=False), eps)
    out = x @ dequantize(weight).astype(dtype, copy=False).T
    if bias is not None:
        out += bias.astype(dtype, copy=False)
    if residual is not None:
        out += residual.astype(dtype, copy=False)
    return gated(*np.split(out, 2, axis=1)) if swiglu else out
