"""Scales and minima of a quantised weight beside wgmma's accumulator: jit helpers of ``quantized_wgmma.py``.

A lane holds the scales of the rows of its accumulators. Minima are operand A of a product with S, the sums of x over
each group: so they are split into bfloat16 numbers without loss, whole numbers as they are, float16 ones as two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .quantized_wgmma_codes import quad_layout

_BYTE_TO_FLOAT = gl.constexpr(tuple(f"prmt.b32 $0, $1, 0x4B000000, 0x744{i};" for i in range(4)))


@gluon.jit
def load_scales(
    planes,  # Planes
    row,  # [ROWS]
    block,
    num_blocks,
    LAYOUT: gl.constexpr,
):
    """(d, and the scales of a block's groups in one or two 64-bit words), [ROWS] each; d itself is a scale of 32."""
    if LAYOUT.quant_block == 32:
        words_ptr = planes.d.to(gl.pointer_type(gl.int64)) + row * (2 * num_blocks) + 2 * block
        first = gl.load(words_ptr)
        second = gl.load(words_ptr + 1)
        d = first
    else:
        WORDS: gl.constexpr = 32 // LAYOUT.group
        words_ptr = planes.scales.to(gl.pointer_type(gl.int64)) + row * (WORDS * num_blocks) + WORDS * block
        first = gl.load(words_ptr)
        second = gl.load(words_ptr + WORDS - 1)
        d = gl.load(planes.d + row * num_blocks + block)
    return d, first, second


@gluon.jit
def scale_of(
    scales,  # from load_scales
    GROUP: gl.constexpr,  # its number in the block
    LAYOUT: gl.constexpr,
):
    """The scale of a group: [ROWS] float32."""
    d, first, second = scales
    if LAYOUT.quant_block == 32:
        scale = _half_to_float(((first if GROUP < 4 else second) >> (16 * (GROUP % 4))).to(gl.int32))
    else:
        word = ((first if GROUP < 8 else second) >> (32 * (GROUP // 4 % 2))).to(gl.int32)
        if LAYOUT.packed:
            word &= 0x0F0F0F0F
        elif LAYOUT.has_signed_scales:
            word ^= -0x7F7F7F80
        # The byte becomes the last of 0x4B000000, which is 2^23 in float32, whose last place is worth 1.
        whole = gl.inline_asm_elementwise(
            _BYTE_TO_FLOAT[GROUP % 4], "=f,r", [word], dtype=gl.float32, is_pure=True, pack=1
        )
        scale = d.to(gl.float32) * (whole - (8388736.0 if LAYOUT.has_signed_scales else 8388608.0))
    return scale


@gluon.jit
def load_minima(
    planes,  # Planes
    row0,
    rows,
    row,  # [ROWS], of the accumulator
    block,
    num_blocks,
    ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """(a pair of groups in each number, [ROWS, pairs]; what they are times, [ROWS]). Two float16, or two bytes."""
    PAIRS: gl.constexpr = 128 // LAYOUT.group
    MINIMA: gl.constexpr = quad_layout(ROWS, PAIRS)
    own = gl.minimum(row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MINIMA)), rows - 1)
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, MINIMA))
    offs = own[:, None] * (PAIRS * num_blocks) + (block * PAIRS + pair)[None, :]
    if LAYOUT.quant_block == 32:
        minima = gl.load(planes.m.to(gl.pointer_type(gl.int32)) + offs)
        times = minima
    else:
        minima = gl.load(planes.mins.to(gl.pointer_type(gl.uint16)) + offs).to(gl.int32)
        times = gl.load(planes.m + row * num_blocks + block)
    return minima, times


@gluon.jit
def _repeat_minima(
    even,  # [ROWS, pairs] float32, of groups 0, 2, ...
    odd,
):
    """[ROWS, 4 * pairs] bfloat16: all groups in order, for S rounded; and again, for the rest of S."""
    pairs = gl.join(even.to(gl.bfloat16), odd.to(gl.bfloat16))
    return gl.join(pairs, pairs).permute(0, 3, 1, 2).reshape([even.shape[0], 4 * even.shape[1]])


@gluon.jit
def _half_to_float(
    bits,  # int32, of which the lower 16 are a float16
):
    return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def start_minima(
    minima,  # from load_minima
    sums,  # [2 * groups, N] in shared memory
    ACC: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """((minima times S, a product that still runs: [ROWS, N],), (what it is times: [ROWS],))."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    bits, times = minima
    N: gl.constexpr = sums.shape[1]
    product = gl.zeros([bits.shape[0], N], gl.float32, layout=ACC)
    if LAYOUT.quant_block == 32:  # float16 numbers, as two of bfloat16 each
        even, odd = _half_to_float(bits), _half_to_float(bits >> 16)
        a = gl.convert_layout(_repeat_minima(even, odd), A, assert_trivial=True)
        product = warpgroup_mma(a, sums, product, use_acc=False, is_async=True)
        even -= even.to(gl.bfloat16).to(gl.float32)
        odd -= odd.to(gl.bfloat16).to(gl.float32)
        a = gl.convert_layout(_repeat_minima(even, odd), A, assert_trivial=True)
        product = warpgroup_mma(a, sums, product, is_async=True)
        factor = gl.full([bits.shape[0]], 1.0, gl.float32, layout=gl.SliceLayout(1, ACC))
    else:
        even, odd = bits & 255, bits >> 8
        if LAYOUT.packed:
            even, odd = even >> 4, odd >> 4
        a = gl.convert_layout(_repeat_minima(even.to(gl.float32), odd.to(gl.float32)), A, assert_trivial=True)
        product = warpgroup_mma(a, sums, product, use_acc=False, is_async=True)
        factor = -times.to(gl.float32)
    return (product,), (factor,)
