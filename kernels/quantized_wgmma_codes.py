"""Codes of a quantised weight as wgmma's operand A: jit helpers of ``quantized_wgmma.py``.

Of 16 columns K = 8 h + 2 q + p of a row of A, lane q (0 to 3) of a quad holds those of both h and p, two registers of
two neighbours p each. Groups of 32 columns are two such steps s. Which column of x stands at K is free, so each lane
holds neighbours, all from one or two words of ``low``:

    group of 32:  column 8 q + 4 s + 2 h + p      group of 16:  column 4 q + 2 h + p

Neighbours stand in the two halves of a word (``reference/quant_layouts.py``), so a mask gives a register of A: two
codes, each the lowest bits of a float16. A float16 below 2^-13 is its bits times 2^-24, so such a code is a number
already, and so is one that stands ``low_bits`` higher. One fused multiply-add takes the type's zero from it and brings
it to where all its digits fit. That is the value times 2^-9. Table types look their values up first.

Where a group's scale is a whole number, it is a factor of that multiply-add. Then A is the product of scale and value
(``num_terms``). Scales have 6 bits (4 in Q2_K, 8 in Q6_K), so with codes of up to 5 bits the product has the 11 bits of
a float16, and A is exact: the product times 2^-19. Other products have up to 14 bits. A is then two float16 numbers,
the product rounded and the rest of it, together the product times 2^-4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .quantized_fixed_point import lookup_assembly
from .reference.quant_layouts import QuantLayout

_LOOKUP = gl.constexpr(lookup_assembly("w0", "w1", "looked_up"))


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
def num_terms(layout: QuantLayout) -> int:
    """Float16 numbers that hold the product of a scale and a value; 0 where scales are no whole numbers."""
    if layout.quant_block == 32:
        return 0
    return 1 if layout.table is None and layout.low_bits + layout.high_bits <= 5 else 2


@gluon.constexpr_function
def unit_of(layout: QuantLayout) -> float:
    """What A is to be multiplied by to be the value, or the product of scale and value."""
    return (2.0**9, 2.0**19, 2.0**4)[num_terms(layout)]


@gluon.constexpr_function
def _power(exponent: int) -> str:
    """2 ** exponent as float16, in both halves of a word; exponent is at least -14."""
    return f"{((15 + exponent) << 10) * 0x00010001:#x}"


@gluon.constexpr_function
def _shift(to: str, of: str, right: int) -> str:
    return f"shr.u32 {to}, {of}, {right};" if right >= 0 else f"shl.b32 {to}, {of}, {-right};"


@gluon.constexpr_function
def _code_assembly(layout: QuantLayout, j: int, odd: bool) -> list[str]:
    """Pair j of codes to ``a``, each in the lowest bits of its half, or ``low_bits`` higher where j is odd."""
    step, half = divmod(j, 2)
    low, high = layout.low_bits, layout.high_bits
    if low == 8 or layout.table:
        word, byte = (half, step) if layout.table else (step, half)
        return [_shift("a", f"w{word}", 8 * byte), "and.b32 a, a, 0x00ff00ff;"]
    place = low * half
    lines = [_shift("a", "w0", 2 * low * step), f"and.b32 a, a, {(((1 << low) - 1) << place) * 0x00010001:#x};"]
    if high:
        at = 8 * step + half if layout.group == 32 else high * half + 4 * odd
        mask = ((1 << high) - 1) << (place + low)
        lines += [_shift("b", "g", at - place - low), f"lop3.b32 a, b, {mask * 0x00010001:#x}, a, 0xEA;"]
    return lines


@gluon.constexpr_function
def unpack_assembly(layout: QuantLayout, odd: bool, byte: int) -> str:
    """The words of a lane for one group of its two rows -> their numbers, in pairs: pair 2 s + h of neighbours.

    Operands, each for the first row and for the second: the pairs, term after term; two words of ``low`` (the second of
    8-bit types only), the word of ``high``, by how many bits to shift ``low`` and ``high`` for this lane, and the word
    of scales, whose ``byte`` is the group's. ``odd``: the group is the second of its high word.
    """
    pairs, terms = layout.group // 8, num_terms(layout)
    inputs = 2 * pairs * max(1, terms)
    zero, low = 128 if layout.table else layout.zero, layout.low_bits
    lines = ["{ .reg .b32 a, b, w0, w1, g, looked_up, scale, scales, higher, factor0, factor1, base, bases, rest;"]
    lines += [".reg .b16 row0, row1;"]
    if terms:  # of both rows: 1024 + the byte, from which 1024 is subtracted, times 32
        lines += [f"prmt.b32 scales, ${inputs + 10}, ${inputs + 11}, {0x0400 + 0x0101 * byte:#x};"]
        lines += ["mov.b32 a, 0x64006400; lop3.b32 scales, scales, 0x00ff00ff, a, 0xEA;"]
        from_zero = "0xf880f880" if layout.has_signed_scales else "0xf800f800"  # -32 * 1152, -32 * 1024
        lines += [f"mov.b32 a, {_power(5)}; mov.b32 b, {from_zero}; fma.rn.f16x2 scales, scales, a, b;"]
    if terms == 1:
        lines += [f"mov.b32 a, {_power(-low)}; mul.f16x2 higher, scales, a;"]
        lines += [f"mov.b32 a, {(0x8000 + zero) * 0x00010001:#x}; mul.f16x2 bases, scales, a;"]
    for row in range(2):
        first, second, high, low_shift, high_shift = (f"${inputs + 2 * i + row}" for i in range(5))
        if layout.table:
            lines += [f"mov.b32 looked_up, {first};", _LOOKUP.value]
        else:
            lines += [f"shr.u32 w0, {first}, {low_shift}; mov.b32 w1, {second};"]
        if layout.high_bits:
            lines += [f"shr.u32 g, {high}, {high_shift};"]
        for of_row, of_both in (("scale", "scales"), ("factor1", "higher"), ("base", "bases"))[: (0, 3, 1)[terms]]:
            lines += [f"mov.b32 {{row0, row1}}, {of_both}; mov.b32 {of_row}, {{row{row}, row{row}}};"]
        if terms == 1:
            lines += ["mov.b32 factor0, scale;"]
        else:
            lines += [f"mov.b32 factor0, {_power(15)}; mov.b32 factor1, {_power(15 - low)};"]
            lines += [f"mov.b32 base, {_power(zero.bit_length() - 10)}; neg.f16x2 base, base;"]
        for j in range(pairs):
            lines += _code_assembly(layout, j, odd)
            factor = f"factor{j % 2 if layout.low_bits < 8 and not layout.table else 0}"
            number, rest = f"${2 * j + row}", f"${2 * (pairs + j) + row}"
            last = "a" if terms == 2 else number
            lines += [f"fma.rn.f16x2 {last}, a, {factor}, base;" if zero else f"mul.f16x2 {last}, a, {factor};"]
            if terms == 2:
                lines += [f"mul.rn.f16x2 {number}, a, scale; neg.f16x2 b, {number};"]
                lines += [f"fma.rn.f16x2 {rest}, a, scale, b;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def unpack_constraints(layout: QuantLayout) -> str:
    return ",".join(["=&r"] * (layout.group // 4 * max(1, num_terms(layout))) + ["r"] * 12)


@gluon.constexpr_function
def repeated(dtype, layout: QuantLayout) -> tuple:
    """One for each pair that a lane takes of a group's row."""
    return (dtype,) * (layout.group // 8 * max(1, num_terms(layout)))


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
def _neighbours(
    pair,  # [ROWS, 4] int32
):
    """The two numbers of each pair: [ROWS, 4, 2] float16."""
    first, second = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pair], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    return gl.join(first, second)


@gluon.jit
def _in_order(
    pairs,  # [ROWS, 4] int32 each
    START: gl.constexpr,  # from here on they are the term's
    GROUP: gl.constexpr,
):
    """[ROWS, GROUP] in the order K."""
    ROWS: gl.constexpr = pairs[0].shape[0]
    result = gl.join(_neighbours(pairs[START]), _neighbours(pairs[START + 1]))
    if GROUP == 16:  # [ROWS, q, p, h]
        result = result.permute(0, 3, 1, 2).reshape([ROWS, 16])
    else:
        second = gl.join(_neighbours(pairs[START + 2]), _neighbours(pairs[START + 3]))
        result = gl.join(result, second).permute(0, 4, 3, 1, 2).reshape([ROWS, 32])
    return result


@gluon.jit
def unpack(
    low,  # from load_spread
    high,  # from load_spread; not read if the type has none
    scales,  # [ROWS] int32, the word with the group's scale; not read where scales are no whole numbers
    INDEX: gl.constexpr,  # of the group
    LAYOUT: gl.constexpr,
):
    """A group's terms, exact float16 numbers, [ROWS, group] in the order K; if there is one, it is given twice."""
    ROWS: gl.constexpr = low.shape[0]
    GROUP: gl.constexpr = LAYOUT.group
    QUAD: gl.constexpr = quad_layout(ROWS, 4)
    PER_LANE: gl.constexpr = low_words(LAYOUT)
    HIGH_GROUPS: gl.constexpr = 1 if LAYOUT.high_bits == 0 else 32 // (LAYOUT.high_bits * GROUP)
    unused = gl.zeros([ROWS, 4], gl.int32, layout=QUAD)
    lane, _ = gl.broadcast(gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))[None, :], unused)
    low_shift, high_shift = lane * 0, lane * 0
    if GROUP == 16:
        low_shift = 4 * lane if LAYOUT.low_bits == 2 else 8 * (lane & 1)
        high_shift = 8 * (lane >> 1) + 2 * (lane & 1) if LAYOUT.low_bits == 2 else 8 * (lane & 1) + 4 * (lane >> 1)
    elif LAYOUT.high_bits > 0:
        high_shift = 2 * lane
    first = take(low, INDEX * PER_LANE)
    second = take(low, INDEX * PER_LANE + PER_LANE - 1)
    third = take(high, INDEX // HIGH_GROUPS) if LAYOUT.high_bits > 0 else first
    fourth = first
    if num_terms(LAYOUT) > 0:
        fourth = gl.convert_layout(scales, gl.SliceLayout(1, QUAD), assert_trivial=True)[:, None]
        fourth, _ = gl.broadcast(fourth, unused)
    pairs = gl.inline_asm_elementwise(
        unpack_assembly(LAYOUT, INDEX % HIGH_GROUPS == 1, INDEX % 4),
        unpack_constraints(LAYOUT),
        [first, second, third, low_shift, high_shift, fourth],
        dtype=repeated(gl.int32, LAYOUT),
        is_pure=True,
        pack=2,  # the two rows of a lane
    )
    first_term = _in_order(pairs, 0, GROUP)
    second_term = first_term
    if num_terms(LAYOUT) == 2:
        second_term = _in_order(pairs, GROUP // 8, GROUP)
    return first_term, second_term
