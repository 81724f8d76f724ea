"""Codes of a quantised weight as wgmma's operand A: jit helpers of ``quantized_wgmma.py``.

Of 16 columns K = 8 h + 2 q + p of a row of A, lane q (0 to 3) of a quad holds those of both h and p, two registers of
two neighbours p each. Groups of 32 columns are two such steps s. Which column of x stands at K is free, so each lane
holds neighbours, all from one or two words of ``low``:

    group of 32:  column 8 q + 4 s + 2 h + p      group of 16:  column 4 q + 2 h + p

Neighbours stand in the two halves of a word (``reference/quant_layouts.py``), so a shift and a mask give a register of
A. Joined with the bits of a power of two whose last place is worth 1 (128 in bfloat16, 1024 in float16), it is a pair
of numbers, from which that power and the type's zero are subtracted exactly. bfloat16 lacks a bit for codes of eight
bits: their top bit chooses whether 128 or 256 is subtracted from the rest. Table types look their values up first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .quantized_fixed_point import lookup_assembly
from .reference.quant_layouts import QuantLayout

_LOOKUP = gl.constexpr(lookup_assembly("w0", "w1", "$8"))  # of a group of 32: its numbers are operands 0 to 7


@gluon.constexpr_function
def low_lanes(layout: QuantLayout) -> int:
    """Lanes of a quad that share a word of ``low``."""
    return max(1, 128 // (layout.group * layout.low_bits))


@gluon.constexpr_function
def low_words(layout: QuantLayout) -> int:
    """Words of ``low`` that a lane takes of a group."""
    return max(1, layout.group * layout.low_bits // 128)


@gluon.constexpr_function
def words_layout(rows: int, words: int, per_lane: int, lanes: int) -> gl.DistributedLinearLayout:
    """Words as A wants them, [rows, words, lanes]: ``per_lane`` neighbours in a lane, each word in ``lanes`` lanes."""
    bits = [1 << i for i in range(words.bit_length() - 1)]
    in_lane, shared = per_lane.bit_length() - 1, lanes.bit_length() - 1
    of_quad = [[0, 0, 1 << i] for i in range(shared)]
    of_quad += [[0, bit, 0] for bit in bits[in_lane : in_lane + 2 - shared]]
    in_registers = bits[:in_lane] + bits[in_lane + 2 - shared :]
    return gl.DistributedLinearLayout(
        reg_bases=[*([0, bit, 0] for bit in in_registers), [8, 0, 0]],
        lane_bases=[*of_quad, [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16 << i, 0, 0] for i in range((rows // 16).bit_length() - 1)],
        block_bases=[],
        shape=[rows, words, lanes],
    )


@gluon.constexpr_function
def quad_layout(rows: int, words: int) -> gl.DistributedLinearLayout:
    """[rows, words], words q and 4 + q in lane q of a quad."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *([0, 4 << i] for i in range(words.bit_length() - 3))],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << i, 0] for i in range((rows // 16).bit_length() - 1)],
        block_bases=[],
        shape=[rows, words],
    )


@gluon.constexpr_function
def _shift(to: str, of: str, right: int) -> str:
    return f"shr.u32 {to}, {of}, {right};" if right >= 0 else f"shl.b32 {to}, {of}, {-right};"


@gluon.constexpr_function
def unpack_assembly(layout: QuantLayout, is_bfloat16: bool, odd: bool) -> str:
    """The words of a lane for one group -> its numbers, in pairs: pair 2 s + h of neighbours.

    Operands: the numbers, 16 bits each; two words of ``low`` (the second of 8-bit types only), the word of ``high``,
    and by how many bits to shift ``low`` and ``high`` for this lane. ``odd``: the group is the second of its high word.
    """
    pairs, low, wide = layout.group // 8, layout.low_bits, layout.low_bits == 8 or layout.table is not None
    first, second, high, low_shift, high_shift = (f"${2 * pairs + i}" for i in range(5))
    zero = 128 if layout.table else layout.zero
    kind, power = ("bf16x2", 0x43004300) if is_bfloat16 else ("f16x2", 0x64006400)
    base = power + zero * 0x00010001  # the power of two plus zero, where its last place is worth 1; else not read
    lines = ["{ .reg .b32 a, b, w0, w1, g, power, base;", f"mov.b32 power, {power:#x}; mov.b32 base, {base:#x};"]
    if layout.table:
        lines += [_LOOKUP.value]
    else:
        lines += [f"shr.u32 w0, {first}, {low_shift}; mov.b32 w1, {second};"]
    if layout.high_bits:
        lines += [f"shr.u32 g, {high}, {high_shift};"]
    for j in range(pairs):
        step, half = divmod(j, 2)
        if layout.table:
            lines += [_shift("a", f"w{half}", 8 * step)]
        elif low == 8:
            lines += [_shift("a", f"w{step}", 8 * half)]
        else:
            lines += [_shift("a", "w0", low * j)]
        if wide and is_bfloat16:
            lines += ["lop3.b32 b, a, 0x00800080, 0x43804380, 0x6A;"]  # 256, or 128 where the top bit is set
            lines += ["lop3.b32 a, a, 0x007f007f, power, 0xEA;"]
            lines += [f"sub.{kind} a, a, b;"]
        else:
            mask = 0x00FF00FF if wide else ((1 << low) - 1) * 0x00010001
            lines += [f"lop3.b32 a, a, {mask:#x}, power, 0xEA;"]
            if layout.high_bits:
                at = 8 * step + half if layout.group == 32 else layout.high_bits * half + 4 * odd
                lines += [_shift("b", "g", at - low)]
                lines += [f"lop3.b32 a, b, {(((1 << layout.high_bits) - 1) << low) * 0x00010001:#x}, a, 0xEA;"]
            lines += [f"sub.{kind} a, a, base;"]
        lines += [f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, a;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def unpack_constraints(layout: QuantLayout) -> str:
    return ",".join(["=h"] * (layout.group // 4) + ["r"] * 5)


@gluon.constexpr_function
def repeated(dtype, layout: QuantLayout) -> tuple:
    return (dtype,) * (layout.group // 4)


@gluon.jit
def load_spread(
    shared,  # [ROWS, words] int32
    ROWS: gl.constexpr,
    PER_LANE: gl.constexpr,
    LANES: gl.constexpr,
):
    """Words of half a block, as ``words_layout``: [ROWS, 4, words * LANES / 4], lane by lane of a quad."""
    WORDS: gl.constexpr = shared.shape[1]
    SPREAD: gl.constexpr = words_layout(ROWS, WORDS, PER_LANE, LANES)
    words = shared.load(gl.SliceLayout(2, SPREAD)).expand_dims(2)
    words, _ = gl.broadcast(words, gl.zeros([ROWS, WORDS, LANES], gl.int32, layout=SPREAD))
    words = words.reshape([ROWS, WORDS * LANES // (4 * PER_LANE), 4, PER_LANE])
    return words.permute(0, 2, 1, 3).reshape([ROWS, 4, WORDS * LANES // 4])


@gluon.jit
def take(
    words,  # [ROWS, 4, COUNT]
    INDEX: gl.constexpr,
):
    """words[:, :, INDEX]: the compiler knows which registers these are."""
    QUAD: gl.constexpr = quad_layout(words.shape[0], 4)
    count: gl.constexpr = words.shape[2]
    for bit in gl.static_range(count.bit_length() - 1):
        even, odd = gl.split(words.reshape([words.shape[0], 4, words.shape[2] // 2, 2]))
        words = odd if (INDEX >> bit) & 1 else even
    return gl.convert_layout(words.reshape([words.shape[0], 4]), QUAD, assert_trivial=True)


@gluon.jit
def unpack(
    low,  # from load_spread
    high,  # from load_spread; not read if the type has none
    INDEX: gl.constexpr,  # of the group
    DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A group's numbers, whole and exact in 16 bits: [ROWS, group] in the order K."""
    ROWS: gl.constexpr = low.shape[0]
    QUAD: gl.constexpr = quad_layout(ROWS, 4)
    PER_LANE: gl.constexpr = low_words(LAYOUT)
    HIGH_GROUPS: gl.constexpr = 1 if LAYOUT.high_bits == 0 else 32 // (LAYOUT.high_bits * LAYOUT.group)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))[None, :]
    lane, _ = gl.broadcast(lane, gl.zeros([ROWS, 4], gl.int32, layout=QUAD))
    low_shift, high_shift = lane * 0, lane * 0
    if LAYOUT.group == 16:
        low_shift = 4 * lane if LAYOUT.low_bits == 2 else 8 * (lane & 1)
        high_shift = 8 * (lane >> 1) + 2 * (lane & 1) if LAYOUT.low_bits == 2 else 8 * (lane & 1) + 4 * (lane >> 1)
    elif LAYOUT.high_bits > 0:
        high_shift = 2 * lane
    first = take(low, INDEX * PER_LANE)
    second = take(low, INDEX * PER_LANE + PER_LANE - 1)
    third = take(high, INDEX // HIGH_GROUPS) if LAYOUT.high_bits > 0 else first
    parts = gl.inline_asm_elementwise(
        unpack_assembly(LAYOUT, DTYPE.is_bf16(), INDEX % HIGH_GROUPS == 1),
        unpack_constraints(LAYOUT),
        [first, second, third, low_shift, high_shift],
        dtype=repeated(DTYPE, LAYOUT),
        is_pure=True,
        pack=1,
    )
    result = gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))  # [ROWS, q, p, h]
    if LAYOUT.group == 16:
        result = result.permute(0, 3, 1, 2).reshape([ROWS, 16])
    else:
        second_step = gl.join(gl.join(parts[4], parts[5]), gl.join(parts[6], parts[7]))
        result = gl.join(result, second_step).permute(0, 4, 3, 1, 2).reshape([ROWS, 32])
    return result
