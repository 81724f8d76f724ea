"""Rotary position embedding. Fused with QK-norm and the write of K and V to their pages, it is ``rope_cache_write``.

    (a, b) -> (a cos - b sin, b cos + a sin)                    (Su et al., 2021)
    pair j of rotary_dim / 2: dimensions (j, j + rotary_dim / 2), or (2j, 2j + 1) if interleaved

Layout: x [num_tokens, num_heads, head_dim], any token and head strides, so q, k and v may be parts of one projection.
cos, sin float32 [max_positions, rotary_dim / 2]; row p holds the angles of position p. Dimensions from rotary_dim on
pass through. head_dim is padded to powers of two in registers only.
One program owns one token and a block of its heads.
Numerics: rotation in float32; one rounding on the way out.
Moves: 2 x head_dim x itemsize bytes a head for about 3 flops an element: bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import as_array, as_tensor, runs_numpy
from .checks import FLOATS, INTEGERS, check, check_dtype, check_last_dim_contiguous, check_same_device, check_shape
from .operators import operator
from .paged_common import write_blocks


@triton.jit
def _load_angles(
    cos_ptr,  # [max_positions, HALF]
    sin_ptr,  # [max_positions, HALF]
    positions_ptr,  # [num_tokens]
    token,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_HALF)
    row = tl.load(positions_ptr + token).to(tl.int64) * HALF
    cos = tl.load(cos_ptr + row + offs, mask=offs < HALF, other=0.0)
    sin = tl.load(sin_ptr + row + offs, mask=offs < HALF, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _load_parts(
    ptr,  # at one token
    rows,  # [BLOCK_HEADS] offset of each head, int64
    mask_rows,  # [BLOCK_HEADS]
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Each head's first and second dimensions of pairs, and those past rotary_dim (the first again if none are)."""
    offs = tl.arange(0, BLOCK_HALF)
    mask = mask_rows[:, None] & (offs < HALF)[None, :]
    ptrs = ptr + rows[:, None] + (offs * 2 if INTERLEAVED else offs)[None, :]
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptrs + (1 if INTERLEAVED else HALF), mask=mask, other=0.0).to(tl.float32)
    tail = first
    if BLOCK_TAIL:
        offs_tail = 2 * HALF + tl.arange(0, BLOCK_TAIL)
        mask = mask_rows[:, None] & (offs_tail < HEAD_DIM)[None, :]
        tail = tl.load(ptr + rows[:, None] + offs_tail[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second, tail


@triton.jit
def _store_parts(
    ptr,
    rows,
    mask_rows,
    first,
    second,
    tail,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_HALF)
    mask = mask_rows[:, None] & (offs < HALF)[None, :]
    ptrs = ptr + rows[:, None] + (offs * 2 if INTERLEAVED else offs)[None, :]
    tl.store(ptrs, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + (1 if INTERLEAVED else HALF), second.to(ptr.dtype.element_ty), mask=mask)
    if BLOCK_TAIL:
        offs_tail = 2 * HALF + tl.arange(0, BLOCK_TAIL)
        mask = mask_rows[:, None] & (offs_tail < HEAD_DIM)[None, :]
        tl.store(ptr + rows[:, None] + offs_tail[None, :], tail.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(first, second, cos, sin):
    """fma by name, so that every kernel rounds alike."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def _rope_kernel(
    x_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    cos_ptr,  # [max_positions, HALF]
    sin_ptr,  # [max_positions, HALF]
    positions_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    x_token_stride,
    x_head_stride,
    num_heads,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # power of two >= HALF
    BLOCK_TAIL: tl.constexpr,  # power of two >= HEAD_DIM - rotary_dim, 0 for none
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    mask_heads = heads < num_heads
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, token, HALF, BLOCK_HALF)
    first, second, tail = _load_parts(
        x_ptr + token * x_token_stride, heads * x_head_stride, mask_heads,
        HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
    )  # fmt: skip
    first, second = _rotate(first, second, cos, sin)
    _store_parts(
        out_ptr, (token * num_heads + heads) * HEAD_DIM, mask_heads, first, second, tail,
        HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
    )  # fmt: skip


def check_rope(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """On the CPU, that the tables hold the positions as well."""
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


def head_parts(head_dim: int, half: int) -> dict[str, int]:
    """The constants that tell a kernel how a head is cut: 2 x ``half`` dimensions that turn, and the others."""
    tail = head_dim - 2 * half
    return {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_TAIL": triton.next_power_of_2(tail) if tail else 0,
    }


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator(_rope_fake)
def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
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
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) a position is past the tables.
    """
    check_rope("x", x, cos, sin, positions)
    if runs_numpy(x):
        arrays = (as_array(t) for t in (x, cos, sin, positions))
        return as_tensor(reference.rope(*arrays, interleaved=interleaved), like=x)
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_heads, block_dim = write_blocks(num_heads, head_dim)
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        x,
        cos,
        sin,
        positions,
        out,
        x.stride(0),
        x.stride(1),
        num_heads,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        num_warps=max(1, block_heads * block_dim // 256),
        **head_parts(head_dim, cos.shape[1]),
    )
    return out
