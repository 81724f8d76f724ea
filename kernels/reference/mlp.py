"""SwiGLU: silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer, 2020, equation 6)."""

import numpy as np


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate, up [..., intermediate] -> [..., intermediate]."""
    dtype = np.result_type(gate.dtype, up.dtype, np.float32)
    gate = gate.astype(dtype)
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the limit, 0
        return gate / (1 + np.exp(-gate)) * up.astype(dtype)
