"""The gemv regime of ``quantized_matmul``: a few tokens in float32, or on float weights, in float32 products.

Each program owns BLOCK_N rows of the weight and all tokens, and walks along the columns. Weights are read once. The
scale is applied to sums over eight columns, not to each weight. The norm's root is not known before the last column, so
it multiplies the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .bound import Launch, launch
from .launch import overlaps
from .quantized_tiles import (
    Input,
    Output,
    each_vector,
    load_minima,
    load_scales,
    load_values,
    planes_of,
    store_tile,
    tile_for,
    tile_rows,
)
from .weight import Weight


@triton.jit(do_not_specialize=["num_tokens", "rows"])  # else a 1 compiles to other code, with other roundings
def _gemv_kernel(
    activations,  # Input
    planes,  # Planes
    output,  # Output
    num_tokens,
    rows,
    columns,
    num_blocks,
    SWIGLU: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= num_tokens
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    VECTORS: tl.constexpr = BLOCK_K // 8  # eight columns are summed before anything else happens to them
    offs_n, mask_n = tile_rows(tl.program_id(0), rows, BLOCK_N, SWIGLU)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    mask_m = offs_m < num_tokens
    acc = tl.zeros([BLOCK_M, BLOCK_N, VECTORS], tl.float32)
    squares = tl.zeros([BLOCK_M, VECTORS], tl.float32)
    AHEAD: tl.constexpr = LAYOUT.is_float  # codes leave no registers for it
    if AHEAD:
        values = load_values(planes, offs_n, mask_n, 0, columns, LAYOUT, BLOCK_K)
    if RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for step in range(tl.cdiv(columns, BLOCK_K)):
        if AHEAD:
            values_now = values
        values = load_values(planes, offs_n, mask_n, step + AHEAD, columns, LAYOUT, BLOCK_K)  # zeros beyond the end
        if not AHEAD:
            values_now = values
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            activations.x + offs_m[:, None] * activations.stride + offs_k[None, :],
            mask=mask_m[:, None] & (offs_k < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if activations.norm is not None:
            squares += tl.sum(tl.reshape(x * x, [BLOCK_M, VECTORS, 8]), axis=2)
            x *= tl.load(activations.norm + offs_k, mask=offs_k < columns, other=0.0).to(tl.float32)[None, :]
        x = tl.reshape(x, [BLOCK_M, 1, VECTORS, 8])
        sums = tl.sum(tl.reshape(values_now, [1, BLOCK_N, VECTORS, 8]) * x, axis=3)  # [BLOCK_M, BLOCK_N, VECTORS]
        if not LAYOUT.is_float:
            scales = load_scales(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)
            sums *= each_vector(scales, LAYOUT.group)[None, :, :]
            if planes.m is not None:
                minima = load_minima(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)
                sums += each_vector(minima, LAYOUT.group)[None, :, :] * tl.sum(x, axis=3)
        acc += sums
    total = tl.sum(acc, axis=2)
    if activations.norm is not None:
        total *= (1.0 / tl.sqrt(tl.sum(squares, axis=1) / columns + activations.eps))[:, None]
    store_tile(total, output, rows, offs_m, mask_m, offs_n, mask_n, SWIGLU)


def launch_gemv(activations: Input, weight: Weight, output: Output, swiglu: bool, resident: bool) -> Launch:
    (rows, columns), num_tokens = weight.shape, activations.x.shape[0]
    bits = weight.layout.low_bits or 8 * weight.planes[0].element_size()
    itemsize = output.out.element_size()
    tile = tile_for("gemv", weight.device, columns, 256, rows=rows, tokens=num_tokens, bits=bits, itemsize=itemsize)
    early = resident and overlaps(weight.device)
    return launch(
        _gemv_kernel,
        (triton.cdiv(rows, tile["BLOCK_N"]),),
        activations,
        planes_of(weight),
        output,
        num_tokens,
        rows,
        columns,
        columns // weight.layout.quant_block,
        SWIGLU=swiglu,
        LAYOUT=weight.layout,
        BLOCK_M=triton.next_power_of_2(num_tokens),
        RESIDENT=early,
        **({"launch_pdl": True} if early else {}),
        **tile,
    )
