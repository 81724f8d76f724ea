"""The fixed-point regime of ``quantized_matmul``: a few tokens in 16 bits, by integer dot products.

    out[t, n] = root[t] * sum over groups g of step[t, g] * (scale[n, g] * I[t, n, g] + minimum[n, g] * S[t, g])
    I[t, n, g] = sum over the columns k of g of value[n, k] * q[t, k]        S[t, g] = sum of q[t, k]

``q`` are the activations, times the norm's weight where there is one, as 16-bit whole numbers with a power of two,
``step``, per 32 columns (``reference/fixed_point.py``); ``root`` is the norm's. I and S are exact in int32.

Layouts: as in ``quantized_matmul``. A program owns BLOCK_N rows of the weight and all tokens. It converts the
activations of its columns itself, from L2: that costs less than a launch of its own.

Four codes lie in the four bytes of a register as they are unpacked (``code_part``), and q = 256 * high + low in two
registers of four bytes each, high signed and low not. So two dp4a instructions multiply four weights by 16 bits.

Two weights of one input may share a launch, whatever their types: a program's number says whose rows it owns.

Where the weight is known to be older than the kernels still running (``resident``), its first tile is requested before
the program waits for them (programmatic dependent launch).

Numerics: the only roundings are that of x to q, at most half a step of 2^-14 to 2^-15 times the largest of the 32
columns, and float32 for the scales' product and the sum over groups. The weight is not rounded.
A group with a number that is not finite, or within 2^-14 of float32's largest, gives NaN.
Moves the planes once, for 2 x num_tokens x rows x columns flops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from .backend import INTERPRETED
from .bound import Launch, launch
from .launch import overlaps
from .quantized_tiles import (
    Input,
    Output,
    load_minima,
    load_scales,
    load_words,
    planes_of,
    store_tile,
    tile_for,
    tile_rows,
)
from .reference import fixed_point
from .reference.quant_layouts import IQ4_TABLE
from .weight import Weight

X_GROUP = tl.constexpr(fixed_point.X_GROUP)


def lookup_assembly(first: str, second: str, codes: str) -> str:
    """Eight four-bit codes of a word through ``IQ4_TABLE`` + 128: bytes of elements 0 4 1 5, and of 2 6 3 7.

    Operands by their names. prmt picks bytes by three bits. So the two halves of the table are looked up separately,
    and bit 3 chooses.
    """
    words = [sum((value + 128) << (8 * i) for i, value in enumerate(IQ4_TABLE[j : j + 4])) for j in range(0, 16, 4)]
    lines = [f"{{ .reg .b32 s, h, u, lower, upper, even, odd; and.b32 s, {codes}, 0x77777777;"]
    lines += [f"shr.u32 h, {codes}, 1; and.b32 h, h, 0x44444444; or.b32 h, h, 0x32103210;"]
    for name in ("even", "odd"):
        lines += [f"mov.b32 u, {words[0]}; prmt.b32 lower, u, {words[1]}, s;"]
        lines += [f"mov.b32 u, {words[2]}; prmt.b32 upper, u, {words[3]}, s;"]
        lines += [f"prmt.b32 {name}, lower, upper, h; shr.u32 s, s, 16; shr.u32 h, h, 16;"]
    lines += [f"prmt.b32 {first}, even, odd, 0x6420; prmt.b32 {second}, even, odd, 0x7531; }}"]
    return " ".join(lines)


_LOOKUP = tl.constexpr(lookup_assembly("$0", "$1", "$2"))


@triton.jit
def code_part(
    low,  # [BLOCK_N, words] int32
    high,  # [BLOCK_N, words * high_bits / low_bits] int32; not read if high_bits is 0
    table_ptr,
    PART: tl.constexpr,  # 0 to 8 / low_bits - 1
    LAYOUT: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Four unsigned codes of each word of ``low``, one per byte: [BLOCK_N, words] int32.

    Part j of a word of P elements holds, from its first byte on, elements 2j, 2j + P/2, 2j + 1 and 2j + 1 + P/2.
    Codes that index a table are looked up; 128 is added, so that they are unsigned too.
    """
    if table_ptr is not None and NVIDIA:
        first, second = tl.inline_asm_elementwise(
            _LOOKUP, "=r,=r,r", [low], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        codes = first if PART == 0 else second
    else:
        codes = low
        if LAYOUT.low_bits < 8:
            codes = (low >> (LAYOUT.low_bits * PART)) & (0x01010101 * ((1 << LAYOUT.low_bits) - 1))
        if LAYOUT.high_bits > 0:
            PARTS: tl.constexpr = 8 // LAYOUT.low_bits
            PER_WORD: tl.constexpr = LAYOUT.low_bits // LAYOUT.high_bits  # words of low that one of high serves
            shift = LAYOUT.high_bits * (PARTS * tl.arange(0, PER_WORD) + PART)
            bits = (high[:, :, None] >> shift[None, None, :]) & (0x01010101 * ((1 << LAYOUT.high_bits) - 1))
            codes |= tl.reshape(bits, low.shape) << LAYOUT.low_bits
        if table_ptr is not None:
            indices, codes = codes, tl.zeros_like(codes)
            for byte in tl.static_range(4):
                value = tl.load(table_ptr + ((indices >> (8 * byte)) & 15)).to(tl.int32) + 128
                codes |= value << (8 * byte)
    return codes


@triton.jit
def to_fixed_point(
    x,  # [BLOCK_K] float32
):
    """``reference.fixed_point``: q [BLOCK_K] int32 from -2^15 to 2^15 - 1, and step [BLOCK_K / 32] float32."""
    x = tl.reshape(x, [x.shape[0] // X_GROUP, X_GROUP])
    magnitude = (
        x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    )  # as whole numbers floats keep their order, and NaN is largest
    largest = tl.minimum(tl.max(magnitude, axis=1), 0x7F800000)  # any NaN is an infinity here
    exponent = (largest + 0x200) >> 23  # after rounding to 15 bits
    exponent = tl.maximum(exponent, 15)  # so that no step is subnormal
    per_step = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^14 / 2^(exponent - 127)
    step = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    step = tl.where(exponent > 254, float("nan"), step)
    # 1.5 * 2^23 has a last place worth 1: adding it rounds to a whole number, which then stands in the low bits.
    q = (x * per_step[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.reshape(q, [x.shape[0] * X_GROUP]), step


@triton.jit
def pack_bytes(
    q,  # [BLOCK_K] int32
    LOW_BITS: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """The high and the low bytes of q in the order of ``code_part``: int32 [words, parts] each."""
    PARTS: tl.constexpr = 8 // LOW_BITS
    q = tl.reshape(q, [q.shape[0] * LOW_BITS // 32, 2, PARTS, 2])
    if LOW_BITS > 2 and NVIDIA:  # a lane holds whole words: bytes are picked from four registers
        even, odd = tl.split(tl.permute(q, [0, 2, 1, 3]))
        a, b = tl.split(even)
        c, d = tl.split(odd)
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; prmt.b32 s, $2, $3, 0x5410; prmt.b32 t, $4, $5, 0x5410; "
            "prmt.b32 $0, s, t, 0x7531; prmt.b32 $1, s, t, 0x6420; }",
            "=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:  # neighbours go to bytes 0 and 2, or 1 and 3, which may come from another lane
        even, odd = tl.split(q)
        pairs = (even & 0xFFFF) | (odd << 16)
        shift = (8 * tl.arange(0, 2))[None, :, None]
        high = tl.sum(((pairs >> 8) & 0x00FF00FF) << shift, axis=1)
        low = tl.sum((pairs & 0x00FF00FF) << shift, axis=1)
    return high, low


@triton.jit
def take_part(
    packed,  # [words, parts]
    PART: tl.constexpr,
):
    """packed[:, PART] as [1, words]. The compiler knows which registers these are, so this costs nothing."""
    is_part = tl.arange(0, packed.shape[1]) == PART
    return tl.sum(tl.where(is_part[None, :], packed, 0), axis=1)[None, :]


@triton.jit
def dot4(
    codes,  # int32, four unsigned bytes
    x,  # int32, four bytes
    total,  # int32, what is added
    X_SIGNED: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """``total`` plus the sum of four products of bytes, int32, element by element."""
    if NVIDIA:
        TYPE: tl.constexpr = "dp4a.u32.s32" if X_SIGNED else "dp4a.u32.u32"
        total = tl.inline_asm_elementwise(
            TYPE + " $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            value = (x << (24 - 8 * byte)) >> 24
            total += ((codes >> (8 * byte)) & 255) * (value if X_SIGNED else value & 255)
    return total


@triton.jit
def each_group(
    steps,  # [BLOCK_K / 32]
    GROUP: tl.constexpr,
):
    """The step of each of the weight's groups: [BLOCK_K / GROUP]."""
    repeated = tl.broadcast_to(steps[:, None], [steps.shape[0], X_GROUP // GROUP])
    return tl.reshape(repeated, [steps.shape[0] * (X_GROUP // GROUP)])


@triton.jit
def load_quants(
    planes,  # Planes
    offs_n,  # [BLOCK_N] int64, rows
    mask_n,  # [BLOCK_N]
    step,
    columns,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(words of low, words of high, scales, minima) of a tile. One that the type lacks is another one, not used."""
    num_blocks = columns // LAYOUT.quant_block
    low = load_words(planes.low, offs_n, mask_n, step, columns, LAYOUT.low_bits, BLOCK_K)
    high = low
    if LAYOUT.high_bits > 0:
        high = load_words(planes.high, offs_n, mask_n, step, columns, LAYOUT.high_bits, BLOCK_K)
    scales = load_scales(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)
    minima = scales
    if planes.m is not None:
        minima = load_minima(planes, offs_n, mask_n, step, num_blocks, LAYOUT, BLOCK_K)
    return low, high, scales, minima


@triton.jit
def multiply_tile(
    tile,  # its number
    activations,  # Input
    planes,  # Planes
    output,  # Output
    num_tokens: tl.constexpr,
    rows,
    columns: tl.constexpr,
    SWIGLU: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NVIDIA: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """All that a program does: BLOCK_N rows of a weight, times all tokens."""
    GROUPS: tl.constexpr = BLOCK_K // LAYOUT.group
    WORDS: tl.constexpr = BLOCK_K * LAYOUT.low_bits // 32
    ZERO_POINT: tl.constexpr = LAYOUT.zero if planes.table is None else 128
    offs_n, mask_n = tile_rows(tile, rows, BLOCK_N, SWIGLU)
    sums = (tl.zeros([BLOCK_N, GROUPS], tl.float32),) * num_tokens
    squares = (tl.zeros([BLOCK_K // X_GROUP], tl.float32),) * num_tokens

    low, high, scales, minima = load_quants(planes, offs_n, mask_n, 0, columns, LAYOUT, BLOCK_K)
    if RESIDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    for step in tl.range(0, (columns + BLOCK_K - 1) // BLOCK_K):
        low_now, high_now, scales_now, minima_now = low, high, scales, minima
        if columns > BLOCK_K:  # the next tile, or nothing beyond the last
            low, high, scales, minima = load_quants(planes, offs_n, mask_n, step + 1, columns, LAYOUT, BLOCK_K)
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < columns
        old_sums, old_squares, sums, squares = sums, squares, (), ()
        for token in tl.static_range(num_tokens):
            x = tl.load(activations.x + token * activations.stride + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            square = old_squares[token]
            if activations.norm is not None:
                square += tl.sum(tl.reshape(x * x, [BLOCK_K // X_GROUP, X_GROUP]), axis=1)
                x *= tl.load(activations.norm + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            q, x_step = to_fixed_point(x)
            x_sums = tl.sum(tl.reshape(q, [GROUPS, LAYOUT.group]), axis=1)
            x_high, x_low = pack_bytes(q, LAYOUT.low_bits, NVIDIA)
            high_sums = tl.zeros([BLOCK_N, WORDS], tl.int32)
            low_sums = tl.zeros([BLOCK_N, WORDS], tl.int32)
            for part in tl.static_range(8 // LAYOUT.low_bits):
                codes = code_part(low_now, high_now, planes.table, part, LAYOUT, NVIDIA)
                high_sums = dot4(codes, take_part(x_high, part), high_sums, True, NVIDIA)
                low_sums = dot4(codes, take_part(x_low, part), low_sums, False, NVIDIA)
            products = tl.reshape(256 * high_sums + low_sums, [BLOCK_N, GROUPS, LAYOUT.group * LAYOUT.low_bits // 32])
            products = tl.sum(products, axis=2) - ZERO_POINT * x_sums[None, :]
            group_step = each_group(x_step, LAYOUT.group)
            total = old_sums[token] + products.to(tl.float32) * (scales_now * group_step[None, :])
            if planes.m is not None:
                total += minima_now * (x_sums.to(tl.float32) * group_step)[None, :]
            sums += (total,)
            squares += (square,)
    for token in tl.static_range(num_tokens):
        total = tl.sum(sums[token], axis=1)
        if activations.norm is not None:
            total *= 1.0 / tl.sqrt(tl.sum(squares[token], axis=0) / columns + activations.eps)
        offs_m = tl.full([1], token, tl.int64)
        store_tile(total[None, :], output, rows, offs_m, offs_m >= 0, offs_n, mask_n, SWIGLU)


@triton.jit(do_not_specialize=["rows"])  # else a 1 compiles to other code, with other roundings
def _fixed_point_kernel(
    activations,  # Input
    planes,  # Planes
    output,  # Output
    num_tokens: tl.constexpr,
    rows,
    columns: tl.constexpr,
    SWIGLU: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NVIDIA: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    multiply_tile(
        tl.program_id(0), activations, planes, output, num_tokens, rows, columns, SWIGLU, LAYOUT, BLOCK_N, BLOCK_K,
        NVIDIA, RESIDENT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_rows", "second_rows"])
def _fixed_point_pair_kernel(
    activations,  # Input
    first,  # Planes
    second,  # Planes
    first_output,  # Output
    second_output,  # Output
    num_tokens: tl.constexpr,
    first_rows,
    second_rows,
    columns: tl.constexpr,
    FIRST_LAYOUT: tl.constexpr,
    SECOND_LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NVIDIA: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    num_second = tl.cdiv(second_rows, BLOCK_N)
    if tile < num_second:  # in front: these are the fewer, and often have more bits
        multiply_tile(
            tile, activations, second, second_output, num_tokens, second_rows, columns, False, SECOND_LAYOUT, BLOCK_N,
            BLOCK_K, NVIDIA, RESIDENT,
        )  # fmt: skip
    else:
        multiply_tile(
            tile - num_second, activations, first, first_output, num_tokens, first_rows, columns, False, FIRST_LAYOUT,
            BLOCK_N, BLOCK_K, NVIDIA, RESIDENT,
        )  # fmt: skip


def _tile(activations: Input, weights: Sequence[Weight]) -> dict[str, int]:
    """The configuration for weights of one input, together: that of the type with the most bits, for all rows."""
    (num_tokens, columns), normed = activations.x.shape, activations.norm is not None
    rows = sum(weight.shape[0] for weight in weights)
    bits = max(weight.layout.low_bits + weight.layout.high_bits for weight in weights)
    facts = {"rows": rows, "tokens": num_tokens, "normed": normed, "bits": bits}
    return tile_for("fixed_point", weights[0].device, columns, 256, **facts)


def _options(device: torch.device, resident: bool) -> dict[str, Any]:
    early = resident and overlaps(device)
    return {"NVIDIA": not INTERPRETED, "RESIDENT": early, **({"launch_pdl": True} if early else {})}


def launch_fixed_point(activations: Input, weight: Weight, output: Output, swiglu: bool, resident: bool) -> Launch:
    (rows, columns), num_tokens = weight.shape, activations.x.shape[0]
    tile = _tile(activations, [weight])
    return launch(
        _fixed_point_kernel,
        (triton.cdiv(rows, tile["BLOCK_N"]),),
        activations,
        planes_of(weight),
        output,
        num_tokens,
        rows,
        columns,
        SWIGLU=swiglu,
        LAYOUT=weight.layout,
        **_options(weight.device, resident),
        **tile,
    )


def launch_fixed_point_pair(
    activations: Input, weights: tuple[Weight, Weight], outputs: tuple[Output, Output], resident: bool
) -> Launch:
    """One launch for two weights of the same number of columns: a program owns rows of one of them."""
    first, second = weights
    num_tokens, columns = activations.x.shape
    tile = _tile(activations, weights)
    return launch(
        _fixed_point_pair_kernel,
        (sum(triton.cdiv(weight.shape[0], tile["BLOCK_N"]) for weight in weights),),
        activations,
        planes_of(first),
        planes_of(second),
        *outputs,
        num_tokens,
        first.shape[0],
        second.shape[0],
        columns,
        FIRST_LAYOUT=first.layout,
        SECOND_LAYOUT=second.layout,
        **_options(first.device, resident),
        **tile,
    )
