"""Matrix product with quantised weights: out = x @ dequantize(weight).T (+ bias) (+ residual).

The steps around a product in a transformer block can be fused into it: the norm of x (``norm_weight``), and
silu(gate) * up of the result's two halves (``swiglu``).

Layouts: x [num_tokens, columns], weight [rows, columns] in planes (``reference/quant_layouts.py``),
out [num_tokens, rows], or [num_tokens, rows / 2] with swiglu.

The number of tokens chooses one of five regimes ("quantized_matmul" in ``launch.py``):

    fixed_point  few tokens in 16 bits, quantised weights, not on AMD: integer dot products with x in 16-bit fixed
                 point (``quantized_fixed_point.py``).
    wgmma        up to 64 tokens in 16 bits, quantised weights, columns in whole blocks of 256, on Hopper: tensor cores
                 multiply the codes, times their scales where these are whole numbers (``quantized_wgmma.py``).
    gemv         few tokens otherwise: float32 products (``quantized_gemv.py``).
    dot          each program owns BLOCK_M tokens x BLOCK_N rows. It dequantises the weights in registers, rounds them
                 to the dtype of the result, and multiplies on tensor cores (float32: in full precision).
    matmul       rows are dequantised into a workspace of at most WORKSPACE_BYTES, then torch multiplies.

In ``dot`` the norm is a launch of its own, because x times the norm's weight could overflow float16. In ``wgmma`` the
launch before the product norms x. In ``matmul`` the norm and swiglu are launches of their own. Otherwise a tile's rows
alternate between gate and up, so that each pair meets in one program.

``quantized_matmul_pair`` multiplies one input by two weights of any types: in ``fixed_point`` in one launch, in the
other regimes one after the other.

``batch_invariant`` takes ``wgmma`` for every number of tokens where it can, and else ``dot`` with one tile size. Which
of them follows from the weight and the dtype of x. A token's result is then the same, bit for bit, whatever tokens
stand beside it.

Numerics: float32 sums, in a fixed order within a regime; bias and residual join in float32 before the one rounding.
In ``matmul`` the numerics are torch.addmm's: partial sums may be 16 bits wide, and float32 may be TF32, as
torch.backends.cuda.matmul says.
Moves, at few tokens: the planes once, for 2 x num_tokens x rows x columns flops.
"""

from __future__ import annotations

from typing import Any

import torch
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
    check_same_device,
    check_shape,
)
from .dequantize import dequantize
from .kernel import Launch, kernel, launch, scratch
from .launch import configuration
from .mlp import swiglu as gated
from .norm import rms_norm
from .quantized_fixed_point import launch_fixed_point, launch_fixed_point_pair
from .quantized_gemv import launch_gemv
from .quantized_tiles import Input, Output, load_tile, planes_of, store_tile, tile_rows
from .quantized_wgmma import launch_wgmma, serves
from .weight import QuantLayout, Weight, check_weight


@triton.jit(do_not_specialize=["num_tokens", "rows"])  # else a 1 compiles to other code, with other roundings
def _dot_kernel(
    x_ptr,  # [num_tokens, columns]
    x_stride,
    planes,  # Planes
    output,  # Output
    num_tokens,
    rows,
    columns,
    num_blocks,
    SWIGLU: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_blocks_m = tl.cdiv(num_tokens, BLOCK_M)  # neighbours share the rows of the weight, so L2 serves all but one
    offs_n, mask_n = tile_rows(tl.program_id(0) // num_blocks_m, rows, BLOCK_N, SWIGLU)
    offs_m = (tl.program_id(0) % num_blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_tokens
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(columns, BLOCK_K)):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + offs_m[:, None] * x_stride + offs_k[None, :],
            mask=mask_m[:, None] & (offs_k < columns)[None, :],
            other=0.0,
        )
        x = x.to(output.out.dtype.element_ty)
        tile = load_tile(planes, offs_n, mask_n, step, columns, num_blocks, LAYOUT, BLOCK_K)
        acc = tl.dot(x, tl.trans(tile.to(x.dtype)), acc, input_precision="ieee")
    store_tile(acc, output, rows, offs_m, mask_m, offs_n, mask_n, SWIGLU)


def _launch_dot(x: Tensor, weight: Weight, output: Output, swiglu: bool, block_m: int) -> Launch:
    (rows, columns), num_tokens = weight.shape, x.shape[0]
    tile = configuration("dot", weight.device, itemsize=output.out.element_size())
    return launch(
        _dot_kernel,
        (triton.cdiv(num_tokens, block_m) * triton.cdiv(rows, tile["BLOCK_N"]),),
        x,
        x.stride(0),
        planes_of(weight),
        output,
        num_tokens,
        rows,
        columns,
        columns // weight.layout.quant_block,
        SWIGLU=swiglu,
        LAYOUT=weight.layout,
        BLOCK_M=block_m,
        **tile,
    )


def most_tokens(layout: QuantLayout, device: torch.device) -> dict[str, int]:
    """The most tokens that each regime serves. The first that serves a call, and can, takes it."""
    return configuration("quantized_matmul", device, is_float=layout.is_float)


def _fits_fixed_point(x: Tensor, weight: Weight) -> bool:
    num_tokens, columns = x.shape
    return num_tokens <= most_tokens(weight.layout, x.device)["fixed_point"] and x.element_size() == 2 and columns > 0


def rows_per_pass(columns: int, itemsize: int, device: torch.device) -> int:
    """Rows that the matmul regime dequantises at a time, a multiple of 16."""
    limit = configuration("matmul", device)["WORKSPACE_BYTES"]
    return max(16, limit // (itemsize * max(1, columns)) // 16 * 16)


def _matmul(out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> None:
    """out = x @ dequantize(weight).T (+ bias) (+ residual), by torch; x has the dtype of ``out``."""
    rows, columns = weight.shape
    addend = residual if bias is None else bias.expand(out.shape) if residual is None else residual.float() + bias
    if weight.layout.is_float and weight.planes[0].dtype == x.dtype:
        _add_product(x, weight.planes[0], addend, out)
        return
    step = rows_per_pass(columns, x.element_size(), x.device)
    if rows <= step:
        _add_product(x, dequantize.run((weight, x.dtype)), addend, out)
        return
    for start in range(0, rows, step):
        rows_now = slice(start, start + step)
        part = dequantize.run((weight.slice_rows(start, start + step), x.dtype))
        _add_product(x, part, None if addend is None else addend[:, rows_now], out[:, rows_now])
        del part  # so that the next one takes its memory


def _add_product(x: Tensor, rows: Tensor, addend: Tensor | None, out: Tensor) -> None:
    """out = x @ rows.T (+ addend), written where ``out`` is even if that is some columns of a wider tensor."""
    if addend is None:
        torch.mm(x, rows.T, out=out)
    else:
        torch.addmm(addend.to(x.dtype), x, rows.T, out=out)


def _check(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    swiglu: bool,
    batch_invariant: bool,
    resident: bool,
    out_dtype: torch.dtype | None,
) -> None:
    check_weight("weight", weight)
    rows, columns = weight.shape
    check_shape("x", x, (None, columns))
    check_dtype("x", x, FLOATS)
    for name, vector, size in (("bias", bias, rows), ("norm_weight", norm_weight, columns)):
        if vector is not None:
            check_shape(name, vector, (size,))
            check_dtype(name, vector, FLOATS)
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], rows))
        check_dtype("residual", residual, FLOATS)
    check_number("eps", eps)
    check(out_dtype in (None, *FLOATS), f"out_dtype {out_dtype}", f"out_dtype is one of {FLOATS}", "Name one of them")
    if norm_weight is not None and columns == 0:
        check(False, f"norm_weight of x {list(x.shape)}", "a mean needs at least one column", "Leave the norm out")
    if swiglu:
        check(rows % 2 == 0, f"weight has {rows} rows", "with swiglu, half are gate and half are up", "Stack both")
        check(residual is None, "swiglu with a residual", "the residual joins a later product", "Leave one out")
    check_same_device(x=x, weight=weight.planes[0], bias=bias, residual=residual, norm_weight=norm_weight)
    check_last_dim_contiguous(x=x, bias=bias, residual=residual, norm_weight=norm_weight)


def _output(x: Tensor, weight: Weight, swiglu: bool, out_dtype: torch.dtype | None, **_: Any) -> Tensor:
    width = weight.shape[0] // 2 if swiglu else weight.shape[0]
    return torch.empty((x.shape[0], width), dtype=out_dtype or x.dtype, device=x.device)


@kernel(checks=_check, output=_output, definition=reference.quantized_matmul)
def quantized_matmul(
    out: Tensor,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    batch_invariant: bool = False,
    resident: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Launch | list[Launch] | None:
    """out = x @ dequantize(weight).T (+ bias) (+ residual), of rms_norm(x) if there is a norm_weight.

    Args:
        x: [num_tokens, columns], float32, float16 or bfloat16; rows may be strided.
        weight: [rows, columns], any type of ``LAYOUTS``.
        bias: [rows].
        residual: [num_tokens, rows], added last; rows may be strided.
        norm_weight: [columns]; x is then normed first, as by ``rms_norm``.
        eps: added to the norm's mean square.
        swiglu: rows are gate's, then as many of up's; the result is silu(gate) * up.
        batch_invariant: one regime for every number of tokens, so that a token's bits do not depend on its neighbours;
            slower for one or two tokens and for more than 64, where ``dot`` serves it for any number.
        resident: no kernel that is still running, or waits to, writes the weight or norm_weight. They may be read
            before those kernels end. Changes no result.
        out_dtype: of the result; None for that of ``x``. The regimes ``dot`` and ``matmul`` compute in it.

    Returns:
        [num_tokens, rows], with swiglu [num_tokens, rows / 2]. What is fused is not rounded in between.

    Raises:
        KernelInputError: an unknown type, planes that do not fit it, shapes, dtypes, devices or numbers that do not
            fit, or swiglu with an odd number of rows or a residual.
    """
    if out.numel() == 0:
        return []
    num_tokens, (rows, columns) = x.shape[0], weight.shape
    most = most_tokens(weight.layout, x.device)
    output = Output(bias, residual, 0 if residual is None else residual.stride(0), out)
    activations = Input(x, x.stride(0), norm_weight, eps)
    if not batch_invariant and _fits_fixed_point(x, weight):
        return launch_fixed_point(activations, weight, output, swiglu, resident)
    if (batch_invariant or num_tokens <= most["wgmma"]) and serves(activations, weight):
        return launch_wgmma(activations, weight, output, swiglu, resident)
    if not batch_invariant and num_tokens <= most["gemv"]:
        return launch_gemv(activations, weight, output, swiglu, resident)
    if batch_invariant or num_tokens <= most["dot"]:
        launches = []
        if norm_weight is not None:
            normed = scratch(num_tokens, columns, dtype=out.dtype, device=x.device)
            launches.append(rms_norm.body(normed, x, norm_weight, eps))
            x = normed
        block_m = 16 if batch_invariant else max(16, triton.next_power_of_2(num_tokens))
        return [*launches, _launch_dot(x, weight, output, swiglu, block_m)]
    x = x.to(out.dtype)
    if norm_weight is not None:
        x = rms_norm.run((x, norm_weight, eps))
    if not swiglu:
        _matmul(out, x, weight, bias, residual)
        return None
    gate_up = torch.empty((num_tokens, rows), dtype=out.dtype, device=x.device)
    _matmul(gate_up, x, weight, bias, None)
    gated.run(tuple(gate_up.chunk(2, dim=1)), out)
    return None


def _check_pair(
    x: Tensor, first: Weight, second: Weight, first_bias: Tensor | None, second_bias: Tensor | None, **options: Any
) -> None:
    for weight, bias in ((first, first_bias), (second, second_bias)):
        _check(x, weight, bias, residual=None, swiglu=False, **options)


def _pair_output(
    x: Tensor, first: Weight, second: Weight, out_dtype: torch.dtype | None, **_: Any
) -> tuple[Tensor, Tensor]:
    return _output(x, first, False, out_dtype), _output(x, second, False, out_dtype)


@kernel(checks=_check_pair, output=_pair_output, definition=reference.quantized_matmul_pair)
def quantized_matmul_pair(
    out: tuple[Tensor, Tensor],
    x: Tensor,
    first: Weight,
    second: Weight,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    batch_invariant: bool = False,
    resident: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Launch | None:
    """``quantized_matmul`` of one input with two weights, which may differ in type and in rows.

    Few tokens in 16 bits with quantised weights are one launch, in fixed point. Otherwise it is two products.

    Args:
        x, norm_weight, eps, batch_invariant, resident, out_dtype: as for ``quantized_matmul``.
        first: [first_rows, columns], any type of ``LAYOUTS``.
        second: [second_rows, columns], any type of ``LAYOUTS``.
        first_bias: [first_rows].
        second_bias: [second_rows].

    Returns:
        [num_tokens, first_rows] and [num_tokens, second_rows].

    Raises:
        KernelInputError: as ``quantized_matmul``, of either product.
    """
    if len(x) > 0 and not batch_invariant and _fits_fixed_point(x, first) and _fits_fixed_point(x, second):
        outputs = Output(first_bias, None, 0, out[0]), Output(second_bias, None, 0, out[1])
        return launch_fixed_point_pair(Input(x, x.stride(0), norm_weight, eps), (first, second), outputs, resident)
    for weight, bias, part in ((first, first_bias, out[0]), (second, second_bias, out[1])):
        quantized_matmul.run(
            (x, weight, bias, None, norm_weight, eps, False, batch_invariant, resident, out_dtype), part
        )
    return None
