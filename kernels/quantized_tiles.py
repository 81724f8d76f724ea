"""Reading a quantised weight inside a Triton kernel, and writing a product: jit helpers.

A kernel takes a weight as ``Planes`` and its layout (``QuantLayout``) as the constexpr ``LAYOUT``. The codes of a tile
arrive in loads of 16 bytes per thread; scales and minima are loaded once per group.

A code becomes a float without a conversion instruction: 0x4B000000 is 2^23 in float32, whose last bit is worth 1, so
``code | 0x4B000000`` read as a float is 2^23 + code. Subtracting 2^23 + zero is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import constant
from .launch import configuration
from .weight import Weight


class Planes(NamedTuple):
    """A weight [rows, columns] as a kernel takes it; None stands for a plane that the type lacks.

    low: [rows, columns * low_bits / 32] int32; of a float type the numbers [rows, columns], bfloat16 as int16.
    high: [rows, columns * high_bits / 32] int32.
    d: [rows, num_blocks] float16.
    scales: [rows, columns / group] int8 or uint8; uint8 with the scale in the low four bits where the layout is packed.
    m: [rows, num_blocks] float16, m or dmin.
    mins: [rows, columns / group] uint8; where the layout is packed the same tensor as scales, in the high four bits.
    table: [16] float32, what codes stand for.
    """

    low: Tensor
    high: Tensor | None
    d: Tensor | None
    scales: Tensor | None
    m: Tensor | None
    mins: Tensor | None
    table: Tensor | None


class Output(NamedTuple):
    """Where a product goes, and what is added to it first.

    bias: [rows] or None.
    residual: [num_tokens, rows] or None, its rows ``residual_stride`` elements apart.
    out: [num_tokens, rows], or [num_tokens, rows / 2] with SWIGLU, contiguous.
    """

    bias: Tensor | None
    residual: Tensor | None
    residual_stride: int
    out: Tensor


class Input(NamedTuple):
    """The activations of a product that norms them on the way.

    x: [num_tokens, columns], rows ``stride`` elements apart.
    norm: [columns], the norm's weight, or None for no norm.
    eps: added to the norm's mean square.
    """

    x: Tensor
    stride: int
    norm: Tensor | None
    eps: float


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
    planes,  # Planes
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    columns,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Values before scaling, whole numbers unless the weights are floats: [BLOCK_N, BLOCK_K] float32."""
    if LAYOUT.is_float:
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < columns)[None, :]
        values = tl.load(planes.low + offs_n[:, None] * columns + offs_k[None, :], mask=mask, other=0)
        if planes.low.dtype.element_ty == tl.int16:  # bfloat16: the upper half of a float32
            values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            values = values.to(tl.float32)
    else:
        codes = load_low(planes.low, offs_n, mask_n, step, columns, LAYOUT.low_bits, BLOCK_K)
        if LAYOUT.high_bits > 0:
            high = load_high(planes.high, offs_n, mask_n, step, columns, LAYOUT.low_bits, LAYOUT.high_bits, BLOCK_K)
            codes |= high << LAYOUT.low_bits
        if planes.table is not None:
            values = tl.load(planes.table + codes)
        else:
            values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + LAYOUT.zero)
    return values


@triton.jit
def _load_per_group(
    d_ptr,  # [rows, num_blocks] float16
    own_ptr,  # the groups' own numbers, [rows, columns / group] int8 or uint8, or None
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    num_blocks,
    SHIFT: tl.constexpr,  # where a group's own number starts in its byte
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d, times the group's own number where the type has one: [BLOCK_N, BLOCK_K / group] float32."""
    PER_BLOCK: tl.constexpr = LAYOUT.quant_block // LAYOUT.group
    BLOCKS: tl.constexpr = BLOCK_K // LAYOUT.quant_block  # whole blocks of the tile
    GROUPS: tl.constexpr = BLOCK_K // LAYOUT.group
    offs_g = step * GROUPS + tl.arange(0, GROUPS)
    mask = mask_n[:, None] & (offs_g < num_blocks * PER_BLOCK)[None, :]
    if PER_BLOCK > 1 and BLOCK_K % LAYOUT.quant_block == 0:  # one load per block, not one per group
        offs_b = step * BLOCKS + tl.arange(0, BLOCKS)
        mask_b = mask_n[:, None] & (offs_b < num_blocks)[None, :]
        d = tl.load(d_ptr + offs_n[:, None] * num_blocks + offs_b[None, :], mask=mask_b, other=0.0)
        d = tl.broadcast_to(d[:, :, None], [offs_n.shape[0], BLOCKS, PER_BLOCK])
        d = tl.reshape(d, [offs_n.shape[0], GROUPS])
    else:
        d = tl.load(d_ptr + offs_n[:, None] * num_blocks + (offs_g // PER_BLOCK)[None, :], mask=mask, other=0.0)
    result = d.to(tl.float32)
    if own_ptr is not None:
        own = tl.load(own_ptr + offs_n[:, None] * (num_blocks * PER_BLOCK) + offs_g[None, :], mask=mask, other=0)
        if LAYOUT.packed:
            own = (own >> SHIFT) & 15
        result *= own.to(tl.float32)
    return result


@triton.jit
def load_scales(
    planes,  # Planes
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The scale of each group, d or d * scales: [BLOCK_N, BLOCK_K / group] float32."""
    return _load_per_group(planes.d, planes.scales, offs_n, mask_n, step, num_blocks, 0, LAYOUT, BLOCK_K)


@triton.jit
def load_minima(
    planes,  # Planes
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is added to each group, m or -dmin * mins: [BLOCK_N, BLOCK_K / group] float32."""
    minima = _load_per_group(planes.m, planes.mins, offs_n, mask_n, step, num_blocks, 4, LAYOUT, BLOCK_K)
    return -minima if planes.mins is not None else minima


@triton.jit
def load_tile(
    planes,  # Planes
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    columns,
    num_blocks,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights, dequantised: [BLOCK_N, BLOCK_K] float32, zero beyond the ends."""
    values = load_values(planes, offs_n, mask_n, step, columns, LAYOUT, BLOCK_K)
    if not LAYOUT.is_float:
        scales = load_scales(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)
        tile = tl.reshape(values, [offs_n.shape[0], scales.shape[1], LAYOUT.group]) * scales[:, :, None]
        if planes.m is not None:
            tile += load_minima(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)[:, :, None]
        values = tl.reshape(tile, [offs_n.shape[0], BLOCK_K])
    return values


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
    output,  # Output
    rows,
    offs_m,  # [BLOCK_M] int64, tokens
    mask_m,
    offs_n,  # [BLOCK_N] int64, from tile_rows
    mask_n,
    SWIGLU: tl.constexpr,
):
    """Writes the sums of a tile, joined by what ``output`` adds."""
    if output.bias is not None:
        total += tl.load(output.bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        PAIRS: tl.constexpr = total.shape[1] // 2
        gate, up = tl.split(tl.reshape(total, [total.shape[0], PAIRS, 2]))
        total = gate / (1.0 + tl.exp(-gate)) * up
        rows = rows // 2
        offs_n, _ = tl.split(tl.reshape(offs_n, [PAIRS, 2]))
        mask_n = offs_n < rows
    mask = mask_m[:, None] & mask_n[None, :]
    if output.residual is not None:
        offs = offs_m[:, None] * output.residual_stride + offs_n[None, :]
        total += tl.load(output.residual + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(output.out + offs_m[:, None] * rows + offs_n[None, :], total.to(output.out.dtype.element_ty), mask=mask)


def planes_of(weight: Weight) -> Planes:
    """The planes of ``weight`` by the part that they play, for a kernel."""
    planes = {plane.name: tensor for plane, tensor in zip(weight.layout.planes, weight.planes, strict=True)}
    packed = planes.get("packed")
    if weight.ggml_type == "BF16":  # the interpreter widens bfloat16 subnormals wrongly; whole numbers it gets right
        planes["values"] = planes["values"].view(torch.int16)
    return Planes(
        low=planes["values" if weight.layout.is_float else "low"],
        high=planes.get("high"),
        d=planes.get("d"),
        scales=planes.get("scales", packed),
        m=planes.get("m", planes.get("dmin")),
        mins=planes.get("mins", packed),
        table=None if weight.layout.table is None else constant(weight.layout.table, weight.device),
    )


def tile_for(kernel: str, device: torch.device, columns: int, least: int, **facts: int) -> dict[str, int]:
    """The configuration of ``kernel``, its BLOCK_K cut to the power of two that holds a row, though not below least."""
    chosen = configuration(kernel, device, columns=columns, **facts)
    return {**chosen, "BLOCK_K": min(chosen["BLOCK_K"], max(least, triton.next_power_of_2(columns)))}
