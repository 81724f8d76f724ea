"""Scales and minima of a quantised weight beside wgmma's accumulator: jit helpers of ``quantized_wgmma.py``.

A lane holds the scales of the rows of its accumulators, which are those of its codes too. Minima are operand A of a
product with S, the sums of x over each group: float16 numbers as they are, whole numbers as such.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .quantized_wgmma_codes import quad_layout, unit_of
from .quantized_wgmma_ends import SUMS_UNIT
from .quantized_wgmma_output import rows_at


@gluon.jit
def load_scales(
    planes,  # Planes
    row,  # [ROWS]
    block,
    num_blocks,
    LAYOUT: gl.constexpr,
):
    """The scales of a block's groups in one or two 64-bit words, [ROWS] each: bytes, or float16 numbers."""
    WORDS: gl.constexpr = 2 if LAYOUT.quant_block == 32 else 32 // LAYOUT.group
    words_ptr = planes.d if LAYOUT.quant_block == 32 else planes.scales
    words_ptr = words_ptr.to(gl.pointer_type(gl.int64)) + WORDS * (row * num_blocks + block)
    first = gl.load(words_ptr)
    second = first
    if WORDS == 2:
        second = gl.load(words_ptr + 1)
    return first, second


@gluon.jit
def load_factor(
    plane_ptr,  # [rows, num_blocks] float16
    row,  # [ROWS]
    block,
    num_blocks,
    LAYOUT: gl.constexpr,
):
    """d, or dmin, of a whole block: [ROWS] float16; of types without them, what nobody reads."""
    factor = row
    if LAYOUT.quant_block == 256:
        factor = gl.load(plane_ptr + (row * num_blocks + block))
    return factor


@gluon.jit
def scale_word(
    scales,  # from load_scales
    GROUP: gl.constexpr,  # its number in the block
    LAYOUT: gl.constexpr,
):
    """[ROWS] int32, with the scale of the group, a whole number, in byte GROUP % 4; plus 128 if scales have a sign."""
    first, second = scales
    word = ((first if GROUP < 8 else second) >> (32 * (GROUP // 4 % 2))).to(gl.int32)
    if LAYOUT.packed:
        word &= 0x0F0F0F0F
    elif LAYOUT.has_signed_scales:
        word ^= -0x7F7F7F80
    return word


@gluon.jit
def factor_of(
    scales,  # from load_scales, of float16 numbers
    GROUP: gl.constexpr,  # its number in the block
    LAYOUT: gl.constexpr,
):
    """What the product of the group's values is times: [ROWS] float32."""
    first, second = scales
    d = _half_to_float(((first if GROUP < 4 else second) >> (16 * (GROUP % 4))).to(gl.int32))
    return d * unit_of(LAYOUT)


@gluon.jit
def load_minima(
    planes,  # Planes
    row_tile,
    rows,
    block,
    num_blocks,
    ROWS: gl.constexpr,
    SWIGLU: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A pair of groups in each number, [ROWS, pairs] int32: two float16, or two bytes."""
    PAIRS: gl.constexpr = 128 // LAYOUT.group
    MINIMA: gl.constexpr = quad_layout(ROWS, PAIRS)
    own = rows_at(gl.arange(0, ROWS, layout=gl.SliceLayout(1, MINIMA)), row_tile, rows, ROWS, SWIGLU)
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, MINIMA))
    offs = PAIRS * (own * num_blocks + block)[:, None] + pair[None, :]
    if LAYOUT.quant_block == 32:
        minima = gl.load(planes.m.to(gl.pointer_type(gl.int32)) + offs)
    else:
        minima = gl.load(planes.mins.to(gl.pointer_type(gl.uint16)) + offs).to(gl.int32)
    return minima


@gluon.jit
def _half_to_float(
    bits,  # int32, of which the lower 16 are a float16
):
    return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def start_minima(
    minima,  # from load_minima
    dmin,  # from load_factor
    sums,  # [2 * groups, N] float16 in shared memory: S rounded, then the rest of S
    acc,  # [ROWS, N], not read
    ACC: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """((minima times S, a product that still runs: [ROWS, N],), (what it is times: [ROWS],))."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    ROWS: gl.constexpr = minima.shape[0]
    if LAYOUT.quant_block == 32:
        even = minima.to(gl.int16).to(gl.float16, bitcast=True)
        odd = (minima >> 16).to(gl.int16).to(gl.float16, bitcast=True)
        factor = gl.full([ROWS], SUMS_UNIT, gl.float32, layout=gl.SliceLayout(1, ACC))
    else:
        even, odd = minima & 255, minima >> 8
        if LAYOUT.packed:
            even, odd = even >> 4, odd >> 4
        even, odd = even.to(gl.float16), odd.to(gl.float16)
        factor = dmin.to(gl.float32) * -SUMS_UNIT
    pairs = gl.join(even, odd)
    a = gl.join(pairs, pairs).permute(0, 3, 1, 2).reshape([ROWS, 4 * even.shape[1]])
    a = gl.convert_layout(a, A, assert_trivial=True)
    product = warpgroup_mma(a, sums, acc, use_acc=False, is_async=True)
    return (product,), (factor,)
