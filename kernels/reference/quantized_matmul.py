"""Matrix product with quantised weights: out = x @ dequantize(weight).T (+ bias) (+ residual)."""

import numpy as np

from .dequantize import dequantize
from .fixed_point import fixed_point as rounded
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
    resident: bool = False,
    out_dtype=None,
    fixed_point: bool = False,
) -> np.ndarray:
    """x [num_tokens, columns], weight [rows, columns], bias [rows], residual [num_tokens, rows] -> [num_tokens, rows].

    With ``norm_weight`` [columns] x is normed first; with ``swiglu`` the result is silu(gate) * up of its two halves,
    [num_tokens, rows / 2].

    ``fixed_point`` rounds what enters the product as the kernel does for a few tokens in 16 bits (``fixed_point.py``):
    x, times ``norm_weight`` if there is one; the norm's root then multiplies the sums.
    ``batch_invariant`` and ``resident`` change how the kernel works, and ``out_dtype`` how its result is rounded: the
    definition has one order of sums and rounds nothing.
    """
    dtype = np.result_type(x.dtype, np.float32)
    x = x.astype(dtype, copy=False)
    if norm_weight is not None:
        norm_weight = norm_weight.astype(dtype, copy=False)
    root = None
    if fixed_point:
        if norm_weight is not None:
            root = 1.0 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + dtype.type(eps))
            x = x * norm_weight
        x = rounded(x).astype(dtype)
    elif norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    out = x @ dequantize(weight).astype(dtype, copy=False).T
    if root is not None:
        out *= root
    if bias is not None:
        out += bias.astype(dtype, copy=False)
    if residual is not None:
        out += residual.astype(dtype, copy=False)
    return gated(*np.split(out, 2, axis=1)) if swiglu else out


def quantized_matmul_pair(
    x,
    first,
    second,
    first_bias=None,
    second_bias=None,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """x [num_tokens, columns], two weights of as many columns -> [num_tokens, first rows], [num_tokens, second rows].

    Options are those of ``quantized_matmul``.
    """
    return quantized_matmul(x, first, first_bias, **options), quantized_matmul(x, second, second_bias, **options)
