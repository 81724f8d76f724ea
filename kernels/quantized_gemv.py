"""The gemv regime of ``quantized_matmul``: a few tokens in float32, or on float weights, in float32 products.

Each program owns BLOCK_N rows of the weight and all tokens, and walks along the columns. Weights are read once. The
scale is applied to sums over eight columns, not to each weight. The norm's root is not known before the last column, so
it multiplies the sums.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from .operators import overlaps
from .quantized_tiles import each_vector, load_minima, load_scales, load_values, store_tile, tile_rows
from .weight import Weight


@triton.jit(do_not_specialize=["num_tokens", "rows"])  # else a 1 compiles to other code, with other roundings
def _gemv_kernel(
    x_ptr,  # [num_tokens, columns]
    low_ptr,  # the planes: see quantized_tiles.plane_arguments
    high_ptr,
    d_ptr,
    scales_ptr,
    m_ptr,
    mins_ptr,
    table_ptr,
    bias_ptr,  # [rows] or None
    residual_ptr,  # [num_tokens, rows] or None
    norm_ptr,  # [columns] or None
    out_ptr,  # [num_tokens, rows], or [num_tokens, rows / 2] if SWIGLU
    x_stride,
    residual_stride,
    num_tokens,
    rows,
    columns,
    num_blocks,
    eps,
    SWIGLU: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
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
    AHEAD: tl.constexpr = LOW_BITS == 0  # codes want their registers for other things
    if AHEAD:
        values = load_values(
            low_ptr, high_ptr, table_ptr, offs_n, mask_n, 0, columns, LOW_BITS, HIGH_BITS, ZERO, BLOCK_K
        )
    if RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for step in range(tl.cdiv(columns, BLOCK_K)):
        if AHEAD:
            values_now = values
        values = load_values(  # of the next tile, zeros beyond the last
            low_ptr, high_ptr, table_ptr, offs_n, mask_n, step + AHEAD, columns, LOW_BITS, HIGH_BITS, ZERO, BLOCK_K
        )
        if not AHEAD:
            values_now = values
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + offs_m[:, None] * x_stride + offs_k[None, :],
            mask=mask_m[:, None] & (offs_k < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if norm_ptr is not None:
            squares += tl.sum(tl.reshape(x * x, [BLOCK_M, VECTORS, 8]), axis=2)
            x *= tl.load(norm_ptr + offs_k, mask=offs_k < columns, other=0.0).to(tl.float32)[None, :]
        x = tl.reshape(x, [BLOCK_M, 1, VECTORS, 8])
        sums = tl.sum(tl.reshape(values_now, [1, BLOCK_N, VECTORS, 8]) * x, axis=3)  # [BLOCK_M, BLOCK_N, VECTORS]
        if LOW_BITS > 0:
            scales = load_scales(
                d_ptr,
                scales_ptr,
                offs_n,
                mask_n,
                step,
                num_blocks,
                15 if PACKED else 255,
                0,
                GROUP,
                QUANT_BLOCK,
                BLOCK_K,
            )
            sums *= each_vector(scales, GROUP)[None, :, :]
            if m_ptr is not None:
                minima = load_minima(
                    m_ptr, mins_ptr, offs_n, mask_n, step, num_blocks, GROUP, QUANT_BLOCK, PACKED, BLOCK_K
                )
                sums += each_vector(minima, GROUP)[None, :, :] * tl.sum(x, axis=3)
        acc += sums
    total = tl.sum(acc, axis=2)
    if norm_ptr is not None:
        total *= (1.0 / tl.sqrt(tl.sum(squares, axis=1) / columns + eps))[:, None]
    store_tile(total, bias_ptr, residual_ptr, out_ptr, residual_stride, rows, offs_m, mask_m, offs_n, mask_n, SWIGLU)


def tile(rows: int, columns: int, num_tokens: int, bits: int, itemsize: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_K, num_warps) for a weight of ``bits`` bits a code or number, and x of ``itemsize`` bytes.

    BLOCK_N makes enough programs to fill the chip. BLOCK_K gives each lane 16 bytes of codes, and never fewer than
    eight columns: a sum across lanes would round differently in each, since every lane contracts its own product into a
    fused multiply-add.
    """
    if bits == 16 and itemsize == 2 and num_tokens <= 2 and columns >= 1024:  # measured: several loads in flight
        return 8 if rows > 65536 else 4, 1024, 4
    block_n = 8 if rows > 2048 and num_tokens <= 2 and itemsize == 2 else 4
    return block_n, min(max(256, triton.next_power_of_2(columns)), max(256, 4096 // bits), 1024), 4


def launch_gemv(common: dict[str, Any], weight: Weight, norm_weight: Tensor | None, eps: float, resident: bool) -> None:
    rows, columns = weight.shape
    num_tokens, itemsize = common["num_tokens"], common["x_ptr"].element_size()
    bits = weight.layout.low_bits or 8 * weight.planes[0].element_size()
    block_n, block_k, num_warps = tile(rows, columns, num_tokens, bits, itemsize)
    early = resident and overlaps(weight.device)
    _gemv_kernel[(triton.cdiv(rows, block_n),)](
        norm_ptr=norm_weight,
        eps=eps,
        BLOCK_M=triton.next_power_of_2(num_tokens),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        RESIDENT=early,
        num_warps=num_warps,
        **({"launch_pdl": True} if early else {}),
        **common,
    )
