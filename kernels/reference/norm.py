"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019, equation 4)."""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., hidden], weight [hidden] -> [..., hidden]."""
    dtype = np.result_type(x.dtype, np.float32)
    x = x.astype(dtype)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + dtype.type(eps)) * weight.astype(dtype)


def add_rms_norm(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream and its norm: (rms_norm(x + residual), x + residual), each [..., hidden].

    The sum is rounded to the dtype of the residual stream before it is normed.
    """
    dtype = np.result_type(x.dtype, residual.dtype, np.float32)
    total = (x.astype(dtype) + residual.astype(dtype)).astype(residual.dtype)
    return rms_norm(total, weight, eps), total
