"""RMSNorm, alone and fused with the residual addition.

    y = x / sqrt(mean(x^2) + eps) * weight                      (Zhang and Sennrich, 2019)

Layout: x [num_tokens, hidden], last dimension contiguous; weight [hidden].
One program owns one row and keeps it in registers.
Numerics: the row is widened to float32 once; mean, root and product stay in float32; one rounding on the way out.
``add_rms_norm`` rounds the sum to the dtype of the residual stream and norms that rounded sum, so a fused and an
unfused model hold the same residual stream.
Moves: 2 x hidden x itemsize bytes a row (4 x with the residual) for about 4 x hidden flops: bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import as_array, as_tensor, runs_numpy
from .checks import (
    FLOATS,
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_number,
    check_same_device,
    check_shape,
)
from .operators import operator


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


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    num_tokens, hidden = x.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    check(
        block <= tl.TRITON_MAX_TENSOR_NUMEL,
        f"x has shape {list(x.shape)}",
        f"one program holds a row: at most {tl.TRITON_MAX_TENSOR_NUMEL} columns",
        "Norm shorter rows",
    )
    _rms_norm_kernel[(num_tokens,)](
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
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    check_shape("x", x, (None, None))
    if x.shape[1] == 0:
        check(False, f"x has shape {list(x.shape)}", "a mean needs at least one column", "Leave the norm out")
    check_shape("weight", weight, (x.shape[1],))
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, FLOATS)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_dtype("residual", residual, FLOATS)
    check_same_device(x=x, weight=weight, residual=residual)
    check_last_dim_contiguous(x=x, weight=weight, residual=residual)
    check_number("eps", eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator(_rms_norm_fake)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row.

    Args:
        x: [num_tokens, hidden], float32, float16 or bfloat16.
        weight: [hidden], any of those dtypes.
        eps: added to the mean square, dimensionless.

    Returns:
        [num_tokens, hidden], dtype of ``x``.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    _check(x, weight, eps)
    if runs_numpy(x, weight):
        return as_tensor(reference.rms_norm(as_array(x), as_array(weight), eps), like=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None)
    return out


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(residual.shape, dtype=residual.dtype, device=residual.device),
    )


@operator(_add_rms_norm_fake)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and norm the sum.

    Args:
        x: [num_tokens, hidden], the output of the last sub-block.
        residual: [num_tokens, hidden], the stream it joins.
        weight: [hidden].
        eps: added to the mean square, dimensionless.

    Returns:
        (norm of the sum, dtype of ``x``; the sum, dtype of ``residual``), each [num_tokens, hidden].

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit.
    """
    _check(x, weight, eps, residual)
    if runs_numpy(x, residual, weight):
        total = as_tensor(as_array(x) + as_array(residual), like=residual)
        return as_tensor(reference.rms_norm(as_array(total), as_array(weight), eps), like=x), total
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch(x, residual, weight, eps, out, total)
    return out, total
