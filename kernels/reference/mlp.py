"""The gated activations of an MLP (Shazeer, 2020, equation 6).

swiglu  silu(gate) * up,  silu(x) = x / (1 + exp(-x))
geglu   gelu(gate) * up,  gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
"""

import numpy as np


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate, up [..., intermediate] -> [..., intermediate]."""
    dtype = np.result_type(gate.dtype, up.dtype, np.float32)
    gate = gate.astype(dtype)
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the limit, 0
        return gate / (1 + np.exp(-gate)) * up.astype(dtype)


def geglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate, up [..., intermediate] -> [..., intermediate]."""
    dtype = np.result_type(gate.dtype, up.dtype, np.float32)
    gate = gate.astype(dtype, copy=False)
    with np.errstate(over="ignore"):  # tanh(inf) = 1
        bend = np.tanh(dtype.type(np.sqrt(2 / np.pi)) * (gate + dtype.type(0.044715) * gate**3))
    return gate / 2 * (1 + bend) * up.astype(dtype, copy=False)
