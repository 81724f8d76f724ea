"""RMSNorm, alone and fused with the residual addition.

    y = x / sqrt(mean(x^2) + eps) * weight                      (Zhang and Sennrich, 2019)

Layout: x [..., hidden], rows contiguous and at one distance; weight [hidden].
One program owns one row and keeps it in registers.
Numerics: the row is widened to float32 once; mean, root and product stay in float32; one rounding on the way out.
``add_rms_norm`` rounds the sum to the dtype of the residual stream and norms that rounded sum, so a fused and an
unfused model hold the same residual stream.
Moves: 2 x hidden x itemsize bytes per row (4 x with the residual) for about 4 x hidden flops: bandwidth-bound.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import (
    FLOATS,
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_number,
    check_rows,
    check_same_device,
    check_shape,
    numbered_rows,
)
from .kernel import Launch, kernel, launch, like
from .launch import configuration


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden]
    residual_ptr,  # [num_tokens, hidden], read if ADD
    weight_ptr,  # [hidden]
    out_ptr,  # [num_tokens, hidden]
    total_ptr,  # [num_tokens, hidden], x + residual, written if ADD
    x_stride,
    residual_stride,
    hidden,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= hidden
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < hidden
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + offs, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * hidden + offs, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden + offs, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    out: Tensor, total: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> Launch:
    x, residual = numbered_rows(x), None if residual is None else numbered_rows(residual)
    num_tokens, hidden = x.shape
    return launch(
        _rms_norm_kernel,
        (num_tokens,),
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        hidden,
        eps,
        ADD=residual is not None,
        BLOCK=triton.next_power_of_2(hidden),
        **configuration("norm", x.device, hidden=hidden),
    )


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    check_rows("x", x)
    hidden = x.shape[-1]
    check(hidden > 0, f"x has shape {list(x.shape)}", "a mean needs at least one column", "Leave the norm out")
    check(
        triton.next_power_of_2(hidden) <= tl.TRITON_MAX_TENSOR_NUMEL,
        f"x has shape {list(x.shape)}",
        f"one program holds a row: at most {tl.TRITON_MAX_TENSOR_NUMEL} columns",
        "Norm shorter rows",
    )
    check_shape("weight", weight, (hidden,))
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, FLOATS)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_dtype("residual", residual, FLOATS)
        check_rows("residual", residual)
    check_same_device(x=x, weight=weight, residual=residual)
    check_last_dim_contiguous(x=x, weight=weight, residual=residual)
    check_number("eps", eps)


@kernel(checks=_check, output=like("x"), definition=reference.rms_norm)
def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Launch:
    """Root-mean-square norm of each row.

    Args:
        x: [..., hidden], one leading dimension or more, float32, float16 or bfloat16.
        weight: [hidden], any of those dtypes.
        eps: added to the mean square, dimensionless.

    Returns:
        [..., hidden], dtype of ``x``.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    return _launch(out, None, x, None, weight, eps)


@kernel(checks=_check, output=like("x", "residual"), definition=reference.add_rms_norm)
def add_rms_norm(out: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Launch:
    """Add ``x`` to the residual stream and norm the sum.

    Args:
        x: [..., hidden], the output of the last sub-block.
        residual: [..., hidden], the stream it joins.
        weight: [hidden].
        eps: added to the mean square, dimensionless.

    Returns:
        (norm of the sum, dtype of ``x``; the sum, dtype of ``residual``), each [..., hidden].

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    normed, total = out
    return _launch(normed, total, x, residual, weight, eps)
