"""SwiGLU: the gated activation between the two matmuls of an MLP.

    y = silu(gate) * up,  silu(x) = x / (1 + exp(-x))           (Shazeer, 2020)

Layout: gate and up [num_tokens, intermediate], last dimension contiguous, any row stride: both may be halves of one
fused projection [num_tokens, 2 * intermediate].
One program owns BLOCK elements of one row.
Numerics: both inputs are widened to float32; one rounding on the way out.
Moves: 3 x itemsize bytes an element for about 5 flops: bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import as_array, as_tensor, runs_numpy
from .checks import FLOATS, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .operators import operator

BLOCK = 1024


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [num_tokens, intermediate]
    up_ptr,  # [num_tokens, intermediate]
    out_ptr,  # [num_tokens, intermediate]
    gate_stride,
    up_stride,
    intermediate,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < intermediate
    gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * intermediate + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@operator(_swiglu_fake)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    Args:
        gate: [num_tokens, intermediate], float32, float16 or bfloat16.
        up: the same shape and dtype.

    Returns:
        [num_tokens, intermediate], dtype of ``gate``, contiguous.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    check_shape("gate", gate, (None, None))
    check_shape("up", up, tuple(gate.shape))
    check_dtype("gate", gate, FLOATS)
    check_dtype("up", up, (gate.dtype,))
    check_same_device(gate=gate, up=up)
    check_last_dim_contiguous(gate=gate, up=up)
    if runs_numpy(gate, up):
        return as_tensor(reference.swiglu(as_array(gate), as_array(up)), like=gate)
    num_tokens, intermediate = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        grid = (num_tokens, triton.cdiv(intermediate, BLOCK))
        _swiglu_kernel[grid](gate, up, out, gate.stride(0), up.stride(0), intermediate, BLOCK=BLOCK)
    return out
