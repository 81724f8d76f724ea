"""The end of the wgmma regime's product: splits added, the result written. Jit helpers of ``quantized_wgmma.py``.

Splits: the programs that differ only in their split leave their sums in memory and count themselves in ``arrived``. The
last one adds the sums of all, in the order of the splits, some tokens at a time. The counter decides only who does it.

Result: each token's sums times its unit, bias, then residual or silu(gate) * up, in float32; one rounding.

Where x is two float16 numbers, the columns of a tile are its tokens, and then its tokens again for the rest of x.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6, and since


class Partials(NamedTuple):
    """Where the programs of a tile leave the sums of their splits. Both are None where there is one split.

    sums: [tiles of rows times those of tokens, SPLITS, N / 8, ROWS * 8] float32, as ``_lane_by_lane`` has them.
    arrived: int32, one for each of these tiles, zeros before the product.
    """

    sums: Tensor | None
    arrived: Tensor | None


@gluon.jit
def rows_at(
    place,  # of the rows of a program
    row_tile,
    rows,
    ROWS: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    """Rows of the weight. With SWIGLU those at r and r + 8 of 16, which one lane holds, are gate and up of a pair.

    Places past the end have the last row.
    """
    if SWIGLU:
        pair = row_tile * (ROWS // 2) + place // 16 * 8 + place % 8
        row = gl.minimum(pair, rows // 2 - 1) + place // 8 % 2 * (rows // 2)
    else:
        row = gl.minimum(row_tile * ROWS + place, rows - 1)
    return row


@gluon.jit
def _lane_by_lane(
    total,  # [ROWS, N]
):
    """[N / 8, ROWS * 8]: in a row four numbers of each lane, which are 16 bytes of memory, and then the next lane's."""
    ROWS: gl.constexpr = total.shape[0]
    N: gl.constexpr = total.shape[1]
    return total.reshape([ROWS // 16, 2, 8, N // 8, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([N // 8, ROWS * 8])


@gluon.jit
def _in_rows(
    total,  # [N / 8, ROWS * 8] from _lane_by_lane
    ROWS: gl.constexpr,
    N: gl.constexpr,
):
    return total.reshape([N // 8, ROWS // 16, 8, 4, 2, 2]).permute(1, 4, 2, 0, 3, 5).reshape([ROWS, N])


@gluon.jit
def add_parts(
    total,  # [ROWS, N]
    PARTS: gl.constexpr,
):
    """[ROWS, N / PARTS]: sums of whole numbers x."""
    ROWS: gl.constexpr = total.shape[0]
    if PARTS == 2:
        first, rest = gl.split(total.reshape([ROWS, 2, total.shape[1] // 2]).permute(0, 2, 1))
        total = first + rest
    return total


@gluon.jit
def leave(
    total,  # [ROWS, N]
    partials,  # Partials
):
    """Write the sums of a split to memory. True in the last program of a tile to do so."""
    ROWS: gl.constexpr = total.shape[0]
    N: gl.constexpr = total.shape[1]
    total = _lane_by_lane(total)
    eight = gl.arange(0, N // 8, layout=gl.SliceLayout(1, total.type.layout))
    place = gl.arange(0, ROWS * 8, layout=gl.SliceLayout(0, total.type.layout))
    tile = gl.program_id(0)
    split = tile.to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
    gl.store(partials.sums + split * (ROWS * N) + (eight[:, None] * (ROWS * 8) + place[None, :]), total)
    _barrier()  # every thread has stored before one of them says so
    return gl.atomic_add(partials.arrived + tile, 1, sem="acq_rel", scope="gpu") == gl.num_programs(1) - 1


@gluon.jit
def add_splits(
    partials,  # Partials
    start,  # token of the tile
    SUMS: gl.constexpr,  # layout of the result
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,  # of the result
    N: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Sums over all splits and both parts of x: [ROWS, TOKENS].

    Loads bypass L1, which does not see what other multiprocessors wrote.
    """
    AT_ONCE: gl.constexpr = 8
    total = _lane_by_lane(gl.zeros([ROWS, TOKENS], gl.float32, layout=SUMS))
    eight = gl.arange(0, TOKENS // 8, layout=gl.SliceLayout(1, total.type.layout))
    place = gl.arange(0, ROWS * 8, layout=gl.SliceLayout(0, total.type.layout))
    splits = gl.num_programs(1)
    ptrs = partials.sums + gl.program_id(0).to(gl.int64) * splits * (ROWS * N) + start * ROWS
    ptrs += eight[:, None] * (ROWS * 8) + place[None, :]
    for first in range(0, splits * PARTS, AT_ONCE):
        first_ptrs = ptrs + first * (ROWS * N // PARTS)  # so that all loads have one address, and constants
        loaded = ()
        for i in gl.static_range(AT_ONCE):
            is_there = (eight >= 0)[:, None] & (place >= 0)[None, :] & (first + i < splits * PARTS)
            its_ptrs = first_ptrs + i * (ROWS * N // PARTS)
            its_sums = gl.load(its_ptrs, mask=is_there, other=0.0, cache_modifier=".cg")
            loaded += (its_sums,)  # type: ignore[assignment]  # a tuple grows
        for i in gl.static_range(AT_ONCE):
            total += loaded[i]
    return gl.convert_layout(_in_rows(total, ROWS, TOKENS), SUMS, assert_trivial=True)


@gluon.jit
def write(
    total,  # [ROWS, TOKENS]
    units_ptr,  # [tiles * N / PARTS] float32
    output,  # Output
    row_tile,
    first_token,
    rows,
    num_tokens,
    SWIGLU: gl.constexpr,
):
    ROWS: gl.constexpr = total.shape[0]
    TOKENS: gl.constexpr = total.shape[1]
    SUMS: gl.constexpr = total.type.layout
    total *= gl.load(units_ptr + first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SUMS)))[None, :]
    if output.bias is not None:
        row = rows_at(gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS)), row_tile, rows, ROWS, SWIGLU)
        total += gl.load(output.bias + row).to(gl.float32)[:, None]
    if SWIGLU:
        gate, up = gl.split(total.reshape([ROWS // 16, 2, 8, TOKENS]).permute(0, 2, 3, 1))
        total = (gate / (1.0 + gl.exp(-gate)) * up).reshape([ROWS // 2, TOKENS])
        rows = rows // 2
    WRITTEN: gl.constexpr = total.type.layout
    row = row_tile * total.shape[0] + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, WRITTEN))
    token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, WRITTEN)).to(gl.int64)
    mask = (row < rows)[:, None] & (token < num_tokens)[None, :]
    if output.residual is not None:
        offs = row[:, None] + token[None, :] * output.residual_stride
        total += gl.load(output.residual + offs, mask=mask, other=0.0).to(gl.float32)
    offs = row[:, None] + token[None, :] * rows
    gl.store(output.out + offs, total.to(output.out.dtype.element_ty), mask=mask)
