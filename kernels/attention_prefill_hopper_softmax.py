"""The running softmax of ``attention_prefill_hopper`` in a warpgroup's registers, one tile of keys at a time.

A warpgroup's product [64, N] gives each lane pairs of neighbouring columns of two rows; four lanes share a row.
Weights: they multiply V as 16-bit numbers. Two of a pair are kept as one 32-bit word: numbers of 16 bits that live
from one tile to the next cost the compiler an instruction per pair.
Sums: each lane sums its own columns. The four sums of a row are added once, at the end.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .attention_common import tanh

_LOG2_E = gl.constexpr(1.4426950408889634)


class Softmax(NamedTuple):
    """The running softmax of a consumer's rows."""

    acc: tuple  # of each part: [ROWS, width] float32
    row_max: gl.tensor  # [ROWS]
    lane_sums: gl.tensor  # [ROWS, 4]


@gluon.constexpr_function
def product_layout(columns):
    """How a warpgroup's products [64, columns] lie in registers."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def no_products(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.zeros([ROWS, COLUMNS], gl.float32, layout=product_layout(COLUMNS))


@gluon.jit
def no_maxima(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, product_layout(COLUMNS)))


@gluon.jit
def no_sums(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return sum_in_lanes(no_products(ROWS, COLUMNS))


@gluon.jit
def sum_in_lanes(weights):
    """[ROWS, N] -> [ROWS, 4]: the sums of the columns that each of four lanes holds."""
    return gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2]), axis=3), axis=1)


@gluon.constexpr_function
def _rounding(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def packed(weights, DTYPE: gl.constexpr):
    """[ROWS, N] float32 -> [ROWS, N // 2]: pairs, rounded to DTYPE."""
    first, second = gl.split(weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        _rounding(DTYPE), "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def _twice(dtype):
    return dtype, dtype


@gluon.jit
def as_operand(weights, DTYPE: gl.constexpr, COLUMNS: gl.constexpr):
    """Pairs as the first operand of a product [ROWS, COLUMNS]."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product_layout(COLUMNS), k_width=2)
    first, second = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [weights], dtype=_twice(DTYPE), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.join(first, second).reshape([weights.shape[0], weights.shape[1] * 2]), LAYOUT)


@gluon.jit
def _greatest(scores):
    """[ROWS]: each row's maximum. Each lane compares in a tree, so that no chain of comparisons is long."""
    GROUPS: gl.constexpr = max(1, scores.shape[1] // 32)
    lanes = scores.reshape([scores.shape[0], GROUPS, scores.shape[1] // (8 * GROUPS), 4, 2])
    return gl.max(gl.max(gl.max(gl.max(lanes, axis=4), axis=2), axis=1), axis=1)


@gluon.jit
def _shift(row_max):
    """What is subtracted from a row's exponents: its maximum, or 0 while it saw no key."""
    return gl.where(row_max == float("-inf"), 0.0, row_max)


@gluon.jit
def maxima(scores, row_max, first_key, positions, rule, MASKED: gl.constexpr):
    """(scores as far as rows see them, row_max with them, decay of all that was summed before)."""
    scale = rule.scale
    if rule.softcap is not None:
        scores = tanh(scores * rule.scale)
        scale = rule.softcap * _LOG2_E
    if MASKED:
        keys = first_key + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        visible = keys[None, :] <= positions[:, None]
        if rule.window is not None:
            visible = visible & (positions[:, None] - keys[None, :] < rule.window)
        scores = gl.where(visible, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.convert_layout(_greatest(scores), row_max.type.layout) * scale)
    return scores, new_max, gl.exp2(row_max - _shift(new_max))


@gluon.jit
def powers(scores, row_max, rule):
    """The weights of one tile, from what ``maxima`` returns."""
    scale = rule.scale
    if rule.softcap is not None:
        scale = rule.softcap * _LOG2_E
    # An explicit fma, because masked and unmasked tiles must round alike.
    return gl.exp2(gl.fma(scores, scale, -_shift(row_max)[:, None]))


@gluon.jit
def add_sums(lane_sums, decay, weights):
    of_lane = gl.convert_layout(decay, gl.SliceLayout(1, lane_sums.type.layout))[:, None]
    return gl.fma(lane_sums, of_lane + gl.zeros_like(lane_sums), sum_in_lanes(weights))


@gluon.jit
def decayed(acc, decay):
    """Of each part: acc times its rows' decay."""
    parts = ()
    for part in gl.static_range(len(acc)):
        parts += (acc[part] * gl.convert_layout(decay, gl.SliceLayout(1, acc[part].type.layout))[:, None],)
    return parts


@gluon.jit
def normalized(acc, total):
    """One part of the weighted mean of the values; 0 for a row that saw no key."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    unseen = gl.convert_layout(total == 0.0, LAYOUT)
    factor = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), LAYOUT)
    return gl.where(unseen[:, None], 0.0, acc * factor[:, None])
