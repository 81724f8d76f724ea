"""SwiGLU and GEGLU: the gated activation between the two matmuls of an MLP.

    swiglu  y = silu(gate) * up,  silu(x) = x / (1 + exp(-x))                                    (Shazeer, 2020)
    geglu   y = gelu(gate) * up,  gelu(x) = x / (1 + exp(-2 u)),  u = sqrt(2/pi) (x + 0.044715 x^3)

GEGLU's gelu is the tanh approximation, x/2 (1 + tanh u), in the form that does not cancel where u is negative.

Layout: gate and up [..., intermediate], rows contiguous and at one distance, whatever it is: both may be halves of one
fused projection [num_tokens, 2 * intermediate].
One program owns BLOCK elements of one row.
Numerics: both inputs are widened to float32; one rounding on the way out.
Moves: 3 x itemsize bytes per element for about 5 flops: bandwidth-bound.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import (
    FLOATS,
    check_dtype,
    check_last_dim_contiguous,
    check_rows,
    check_same_device,
    check_shape,
    numbered_rows,
)
from .kernel import Launch, kernel, launch, like
from .launch import configuration

_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def _gated_kernel(
    gate_ptr,  # [num_tokens, intermediate]
    up_ptr,  # [num_tokens, intermediate]
    out_ptr,  # [num_tokens, intermediate]
    gate_stride,
    up_stride,
    intermediate,
    GELU: tl.constexpr,  # else silu
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < intermediate
    gate = tl.load(gate_ptr + row * gate_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + offs, mask=mask, other=0.0).to(tl.float32)
    exponent = gate
    if GELU:
        exponent = _TWICE_SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
    out = gate / (1.0 + tl.exp(-exponent)) * up
    tl.store(out_ptr + row * intermediate + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _check(gate: Tensor, up: Tensor) -> None:
    check_rows("gate", gate)
    check_shape("up", up, tuple(gate.shape))
    check_rows("up", up)
    check_dtype("gate", gate, FLOATS)
    check_dtype("up", up, (gate.dtype,))
    check_same_device(gate=gate, up=up)
    check_last_dim_contiguous(gate=gate, up=up)


def _launch(out: Tensor, gate: Tensor, up: Tensor, *, gelu: bool) -> Launch:
    gate, up = numbered_rows(gate), numbered_rows(up)
    num_tokens, intermediate = gate.shape
    chosen = configuration("gated", gate.device)
    grid = (num_tokens, triton.cdiv(intermediate, chosen["BLOCK"]))
    return launch(_gated_kernel, grid, gate, up, out, gate.stride(0), up.stride(0), intermediate, GELU=gelu, **chosen)


@kernel(checks=_check, output=like("gate"), definition=reference.swiglu)
def swiglu(out: Tensor, gate: Tensor, up: Tensor) -> Launch:
    """silu(gate) * up, element by element.

    Args:
        gate: [..., intermediate], one leading dimension or more, float32, float16 or bfloat16.
        up: the same shape and dtype.

    Returns:
        [..., intermediate], dtype of ``gate``, contiguous.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    return _launch(out, gate, up, gelu=False)


@kernel(checks=_check, output=like("gate"), definition=reference.geglu)
def geglu(out: Tensor, gate: Tensor, up: Tensor) -> Launch:
    """gelu(gate) * up, element by element, with gelu's tanh approximation.

    Args:
        gate: [..., intermediate], one leading dimension or more, float32, float16 or bfloat16.
        up: the same shape and dtype.

    Returns:
        [..., intermediate], dtype of ``gate``, contiguous.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    return _launch(out, gate, up, gelu=True)
