"""Reading a quantised weight inside a Triton kernel, and writing a product: jit helpers.

Every kernel that reads a ``Weight`` takes the planes as the same pointers (``plane_arguments`` makes them,
None where the type has no such plane) and the layout as constexpr numbers. The codes of a tile arrive in loads of 16
bytes a thread; scales and minima are loaded once a group.

A code becomes a float without a conversion instruction: 0x4B000000 is 2^23 in float32, whose last bit is worth 1, so
``code | 0x4B000000`` read as a float is 2^23 + code. Subtracting 2^23 + zero is exact.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .weight import Weight


@triton.jit
def load_words(
    plane_ptr,  # [rows, columns * BITS / 32] int32
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,  # the tile starts at column step * BLOCK_K
    columns,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The words that hold a tile's codes: [BLOCK_N, BLOCK_K * BITS / 32] int32, zero beyond the ends."""
    WORDS: tl.constexpr = BLOCK_K * BITS // 32
    words_per_row = columns * BITS // 32
    offs_w = step * WORDS + tl.arange(0, WORDS)
    return tl.load(
        plane_ptr + offs_n[:, None] * words_per_row + offs_w[None, :],
        mask=mask_n[:, None] & (offs_w < words_per_row)[None, :],
        other=0,
    )


@triton.jit
def load_low(
    plane_ptr,  # [rows, columns * BITS / 32] int32
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    columns,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of the plane ``low`` in natural order: [BLOCK_N, BLOCK_K] int32."""
    words = load_words(plane_ptr, offs_n, mask_n, step, columns, BITS, BLOCK_K)
    i = tl.arange(0, 32 // BITS)
    shift = BITS * (i // 2) + 16 * (i % 2)
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [offs_n.shape[0], BLOCK_K])


@triton.jit
def load_high(
    plane_ptr,  # [rows, columns * BITS / 32] int32
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    columns,
    LOW_BITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of the plane ``high`` in natural order: [BLOCK_N, BLOCK_K] int32."""
    words = load_words(plane_ptr, offs_n, mask_n, step, columns, BITS, BLOCK_K)
    i = tl.arange(0, 32 // BITS)
    per_low_word: tl.constexpr = 32 // LOW_BITS
    bit = LOW_BITS * (i % per_low_word // 2) + 16 * (i % 2)  # where the low bits start in their own word
    part = i // per_low_word * (8 // LOW_BITS) + bit % 8 // LOW_BITS
    shift = 8 * (bit // 8) + BITS * part
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [offs_n.shape[0], BLOCK_K])


@triton.jit
def load_values(
    low_ptr,  # [rows, ...] int32, or the float weights [rows, columns], bfloat16 as int16
    high_ptr,
    table_ptr,  # [16] float32, for types whose codes index a table
    offs_n,  # [BLOCK_N] int64
    mask_n,  # [BLOCK_N]
    step,
    columns,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Values before scaling, whole numbers unless the weights are floats: [BLOCK_N, BLOCK_K] float32."""
    if LOW_BITS == 0:
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < columns)[None, :]
        values = tl.load(low_ptr + offs_n[:, None] * columns + offs_k[None, :], mask=mask, other=0)
        if low_ptr.dtype.element_ty == tl.int16:  # bfloat16: the upper half of a float32
            values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            values = values.to(tl.float32)
    else:
        codes = load_low(low_ptr, offs_n, mask_n, step, columns, LOW_BITS, BLOCK_K)
        if HIGH_BITS > 0:
            codes |= load_high(high_ptr, offs_n, mask_n, step, columns, LOW_BITS, HIGH_BITS, BLOCK_K) << LOW_BITS
        if table_ptr is not None:
            values = tl.load(table_ptr + codes)
        else:
            values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
    return values


@triton.jit
def load_scales(
    d_ptr,  # [rows, num_blocks] float16
    scales_ptr,  # [rows, columns / GROUP] int8, uint8, or None
    offs_n,  # [BLOCK_N] int64
    mask_n,  # [BLOCK_N]
    step,
    num_blocks,
    MASK: tl.constexpr,  # bits of an entry of scales_ptr that are the scale
    SHIFT: tl.constexpr,  # and where they start
    GROUP: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scale (or minimum) of each group: d, or d times the group's own number: [BLOCK_N, BLOCK_K / GROUP] float32."""
    PER_BLOCK: tl.constexpr = QUANT_BLOCK // GROUP
    offs_g = step * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    mask = mask_n[:, None] & (offs_g < num_blocks * PER_BLOCK)[None, :]
    if PER_BLOCK > 1 and BLOCK_K % QUANT_BLOCK == 0:  # one load a block, not one a group
        offs_b = step * (BLOCK_K // QUANT_BLOCK) + tl.arange(0, BLOCK_K // QUANT_BLOCK)
        mask_b = mask_n[:, None] & (offs_b < num_blocks)[None, :]
        d = tl.load(d_ptr + offs_n[:, None] * num_blocks + offs_b[None, :], mask=mask_b, other=0.0)
        d = tl.broadcast_to(d[:, :, None], [offs_n.shape[0], BLOCK_K // QUANT_BLOCK, PER_BLOCK])
        d = tl.reshape(d, [offs_n.shape[0], BLOCK_K // GROUP])
    else:
        d = tl.load(d_ptr + offs_n[:, None] * num_blocks + (offs_g // PER_BLOCK)[None, :], mask=mask, other=0.0)
    scale = d.to(tl.float32)
    if scales_ptr is not None:
        own = tl.load(scales_ptr + offs_n[:, None] * (num_blocks * PER_BLOCK) + offs_g[None, :], mask=mask, other=0)
        if MASK != 255:
            own = (own >> SHIFT) & MASK
        scale *= own.to(tl.float32)
    return scale


@triton.jit
def load_tile(
    low_ptr,
    high_ptr,
    d_ptr,
    scales_ptr,
    m_ptr,
    mins_ptr,
    table_ptr,
    offs_n,  # [BLOCK_N] int64
    mask_n,  # [BLOCK_N]
    step,
    columns,
    num_blocks,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights, dequantised: [BLOCK_N, BLOCK_K] float32, zero beyond the ends."""
    values = load_values(
        low_ptr,
        high_ptr,
        table_ptr,
        offs_n,
        mask_n,
        step,
        columns,
        LOW_BITS,
        HIGH_BITS,
        ZERO,
        BLOCK_K,
    )
    if LOW_BITS > 0:
        scales = load_scales(
            d_ptr, scales_ptr, offs_n, mask_n, step, num_blocks, 15 if PACKED else 255, 0, GROUP, QUANT_BLOCK, BLOCK_K
        )
        tile = tl.reshape(values, [offs_n.shape[0], BLOCK_K // GROUP, GROUP]) * scales[:, :, None]
        if m_ptr is not None:
            mins = load_minima(m_ptr, mins_ptr, offs_n, mask_n, step, num_blocks, GROUP, QUANT_BLOCK, PACKED, BLOCK_K)
            tile += mins[:, :, None]
        values = tl.reshape(tile, [offs_n.shape[0], BLOCK_K])
    return values


@triton.jit
def load_minima(
    m_ptr,  # [rows, num_blocks] float16
    mins_ptr,  # [rows, columns / GROUP] uint8, or None
    offs_n,  # [BLOCK_N] int64
    mask_n,  # [BLOCK_N]
    step,
    num_blocks,
    GROUP: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is added to each group, m or -dmin * mins: [BLOCK_N, BLOCK_K / GROUP] float32."""
    MASK: tl.constexpr = 15 if PACKED else 255
    SHIFT: tl.constexpr = 4 if PACKED else 0
    minima = load_scales(m_ptr, mins_ptr, offs_n, mask_n, step, num_blocks, MASK, SHIFT, GROUP, QUANT_BLOCK, BLOCK_K)
    return -minima if mins_ptr is not None else minima


@triton.jit
def tile_rows(
    tile,  # its number
    rows,
    BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Rows of the weight that a tile owns, int64 [BLOCK_N], and which there are; if SWIGLU gate, up, gate, ..."""
    lane = tl.arange(0, BLOCK_N)
    if SWIGLU:
        column = tile.to(tl.int64) * (BLOCK_N // 2) + lane // 2
        return column + (lane % 2) * (rows // 2), column < rows // 2
    else:
        offs_n = tile.to(tl.int64) * BLOCK_N + lane
        return offs_n, offs_n < rows


@triton.jit
def each_vector(
    groups,  # [BLOCK_N, num_groups]
    GROUP: tl.constexpr,
):
    """The number of its group for each eight columns: [BLOCK_N, num_groups * GROUP / 8]."""
    PER_GROUP: tl.constexpr = GROUP // 8
    repeated = tl.broadcast_to(groups[:, :, None], [groups.shape[0], groups.shape[1], PER_GROUP])
    return tl.reshape(repeated, [groups.shape[0], groups.shape[1] * PER_GROUP])


@triton.jit
def store_tile(
    total,  # [BLOCK_M, BLOCK_N] float32
    bias_ptr,  # [rows] or None
    residual_ptr,  # [num_tokens, rows] or None
    out_ptr,  # [num_tokens, rows], or [num_tokens, rows / 2] if SWIGLU
    residual_stride,
    rows,
    offs_m,  # [BLOCK_M] int64
    mask_m,
    offs_n,  # [BLOCK_N] int64, from _tile_rows
    mask_n,
    SWIGLU: tl.constexpr,
):
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        PAIRS: tl.constexpr = total.shape[1] // 2
        gate, up = tl.split(tl.reshape(total, [total.shape[0], PAIRS, 2]))
        total = gate / (1.0 + tl.exp(-gate)) * up
        rows = rows // 2
        offs_n, _ = tl.split(tl.reshape(offs_n, [PAIRS, 2]))
        mask_n = offs_n < rows
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        offs = offs_m[:, None] * residual_stride + offs_n[None, :]
        total += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * rows + offs_n[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def plane_arguments(weight: Weight) -> dict[str, object]:
    """The keyword arguments, the same for every kernel, that hand it ``weight``."""
    layout = weight.layout
    planes = {plane.name: tensor for plane, tensor in zip(layout.planes, weight.planes, strict=True)}
    packed = planes.get("packed")
    if weight.ggml_type == "BF16":  # the interpreter widens bfloat16 subnormals wrongly; whole numbers it gets right
        planes["values"] = planes["values"].view(torch.int16)
    return {
        "low_ptr": planes.get("values", planes.get("low")),
        "high_ptr": planes.get("high"),
        "d_ptr": planes.get("d"),
        "scales_ptr": planes.get("scales", packed),
        "m_ptr": planes.get("m", planes.get("dmin")),
        "mins_ptr": planes.get("mins", packed),
        "table_ptr": None if layout.table is None else _table(layout.table, weight.device),
        "columns": weight.shape[1],
        "num_blocks": weight.shape[1] // layout.quant_block,
        "LOW_BITS": layout.low_bits,
        "HIGH_BITS": layout.high_bits,
        "ZERO": layout.zero,
        "GROUP": layout.group,
        "QUANT_BLOCK": layout.quant_block,
        "PACKED": packed is not None,
    }


@functools.cache
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
