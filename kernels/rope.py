"""Rotary position embedding. Fused with QK-norm and the write of K and V to their pages, it is ``rope_cache_write``.

    (a, b) -> (a cos - b sin, b cos + a sin)                    (Su et al., 2021)
    pair j of rotary_dim / 2: dimensions (j, j + rotary_dim / 2), or (2j, 2j + 1) if interleaved

Layout: x [num_tokens, num_heads, head_dim] has any token and head strides, so q, k and v may be parts of one
projection. cos and sin are float32 [max_positions, rotary_dim / 2]; row p holds the angles of position p. Dimensions
from rotary_dim on are copied. head_dim is padded to powers of two in registers only.
One program owns one token and a block of its heads.
Numerics: the rotation is float32, rounded once.
Moves: 2 x head_dim x itemsize bytes per head for about 3 flops per element: bandwidth-bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import as_array
from .checks import FLOATS, INTEGERS, check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .kernel import Launch, kernel, launch, like
from .paged_common import heads_of, write_blocks


class Angles(NamedTuple):
    """The tables of angles, and each token's row in them."""

    cos: Tensor  # [max_positions, HALF]
    sin: Tensor  # the same
    positions: Tensor  # [num_tokens]


class Parts(NamedTuple):
    """The dimensions of a block of heads, float32, each part padded to a power of two."""

    first: tl.tensor  # [BLOCK_HEADS, HALF] of each pair
    second: tl.tensor  # the same
    tail: tl.tensor  # [BLOCK_HEADS, HEAD_DIM - 2 * HALF], which do not turn; ``first`` again if there are none


@triton.jit
def load_angles(angles, token, HALF: tl.constexpr):
    """(cos, sin) of one token, [1, HALF] each."""
    offs = tl.arange(0, triton.next_power_of_2(HALF))
    row = tl.load(angles.positions + token).to(tl.int64) * HALF
    cos = tl.load(angles.cos + row + offs, mask=offs < HALF, other=0.0)
    sin = tl.load(angles.sin + row + offs, mask=offs < HALF, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def load_parts(
    ptr,
    rows,  # [BLOCK_HEADS] offset of each head, int64
    mask_rows,  # [BLOCK_HEADS]
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    offs = tl.arange(0, triton.next_power_of_2(HALF))
    mask = mask_rows[:, None] & (offs < HALF)[None, :]
    ptrs = ptr + rows[:, None] + (offs * 2 if INTERLEAVED else offs)[None, :]
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptrs + (1 if INTERLEAVED else HALF), mask=mask, other=0.0).to(tl.float32)
    tail = first
    if HEAD_DIM > 2 * HALF:
        offs_tail = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))
        mask = mask_rows[:, None] & (offs_tail < HEAD_DIM)[None, :]
        tail = tl.load(ptr + rows[:, None] + offs_tail[None, :], mask=mask, other=0.0).to(tl.float32)
    return Parts(first, second, tail)


@triton.jit
def store_parts(
    ptr,
    rows,  # [BLOCK_HEADS] offset of each head, int64
    mask_rows,  # [BLOCK_HEADS]
    parts,  # Parts
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    offs = tl.arange(0, triton.next_power_of_2(HALF))
    mask = mask_rows[:, None] & (offs < HALF)[None, :]
    ptrs = ptr + rows[:, None] + (offs * 2 if INTERLEAVED else offs)[None, :]
    tl.store(ptrs, parts.first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + (1 if INTERLEAVED else HALF), parts.second.to(ptr.dtype.element_ty), mask=mask)
    if HEAD_DIM > 2 * HALF:
        offs_tail = 2 * HALF + tl.arange(0, triton.next_power_of_2(HEAD_DIM - 2 * HALF))
        mask = mask_rows[:, None] & (offs_tail < HEAD_DIM)[None, :]
        tl.store(ptr + rows[:, None] + offs_tail[None, :], parts.tail.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate(parts, cos, sin):
    """An explicit fma, so that every kernel rounds alike."""
    first, second, tail = parts
    return Parts(tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin), tail)


@triton.jit
def _rope_kernel(
    x,  # Heads
    angles,  # Angles
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    num_heads,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    mask_heads = heads < num_heads
    cos, sin = load_angles(angles, token, HALF)
    x_ptr = x.ptr + token * x.token_stride
    parts = load_parts(x_ptr, heads * x.head_stride, mask_heads, HEAD_DIM, HALF, INTERLEAVED)
    out_rows = (token * num_heads + heads) * HEAD_DIM
    store_parts(out_ptr, out_rows, mask_heads, rotate(parts, cos, sin), HEAD_DIM, HALF, INTERLEAVED)


def check_rope(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """What rotating ``x``, named ``name``, needs. For CPU tensors the tables must hold the positions, too."""
    check_shape(name, x, (None, None, None))
    num_tokens, _, head_dim = x.shape
    check(0 < head_dim <= 256, f"head_dim is {head_dim}", "head_dim must be 1 to 256", "Use a model with smaller heads")
    check_shape("cos", cos, (None, None))
    check_shape("sin", sin, tuple(cos.shape))
    rotary_dim = 2 * cos.shape[1]
    check(
        0 < rotary_dim <= head_dim,
        f"the tables turn {rotary_dim} of {head_dim} dimensions",
        "rotary_dim must be 2 to head_dim",
        "Make the tables for this model",
    )
    check_shape("positions", positions, (num_tokens,))
    check_dtype(name, x, FLOATS)
    check_dtype("cos", cos, (torch.float32,))
    check_dtype("sin", sin, (torch.float32,))
    check_dtype("positions", positions, INTEGERS)
    check_same_device(**{name: x}, cos=cos, sin=sin, positions=positions)
    check_last_dim_contiguous(**{name: x}, positions=positions)
    for table_name, table in (("cos", cos), ("sin", sin)):
        check(
            table.is_contiguous(), f"{table_name} has strides {table.stride()}", "the tables are contiguous", "Copy it"
        )
    if positions.device.type == "cpu" and num_tokens:
        array = as_array(positions)
        check(
            array.min() >= 0 and array.max() < cos.shape[0],
            f"positions run from {array.min()} to {array.max()}",
            f"the tables hold positions 0 to {cos.shape[0] - 1}",
            "Make longer tables",
        )


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    check_rope("x", x, cos, sin, positions)


@kernel(checks=_check, output=like("x"), definition=reference.rope)
def rope(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Launch:
    """Rotate each head by its token's position.

    Args:
        x: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; any token and head strides.
        cos: float32 [max_positions, rotary_dim / 2], rotary_dim <= head_dim.
        sin: the same.
        positions: int32 or int64 [num_tokens], rows of the tables.
        interleaved: pairs are neighbours (2j, 2j + 1), not (j, j + rotary_dim / 2).

    Returns:
        Like ``x``, contiguous; dimensions from rotary_dim on are those of ``x``.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (on the CPU only) a position is past the tables.
    """
    num_tokens, num_heads, head_dim = x.shape
    block_heads, block_dim = write_blocks(num_heads, head_dim)
    return launch(
        _rope_kernel,
        (num_tokens, triton.cdiv(num_heads, block_heads)),
        heads_of(x),
        Angles(cos, sin, positions),
        out,
        num_heads,
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        num_warps=max(1, block_heads * block_dim // 256),
    )
