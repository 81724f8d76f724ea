"""Rotary embedding fused with the norms of Q and K and the write of K and V to their pages.

    q = rope(norm(q)),  pages[slot] = rope(norm(k)), v          norm(x) = x * weight / sqrt(mean(x^2) + eps)

Layout: as ``rope`` and ``paged_cache`` have it. A token's slot is slot_mapping[token]; a negative one is not written.
One program owns one token and a block of its heads: the first blocks rotate q, the others norm and rotate k and write
it with v to the token's slot, quantised where the pages are (paged_common).
Numerics: norm and rotation in float32; one rounding on the way out, or into the codes of quantised pages.
Moves: 2 x head_dim x itemsize bytes a head for about 3 flops an element (8 with the norm): bandwidth-bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import as_array, as_tensor, runs_numpy
from .checks import FLOATS, check_dtype, check_last_dim_contiguous, check_number, check_same_device, check_shape
from .operators import operator
from .paged_checks import check_write
from .paged_common import (
    LIMITS,
    as_codes,
    encode,
    largest_magnitude,
    row_scale,
    write_blocks,
    write_by_definition,
    write_heads,
)
from .rope import _load_angles, _load_parts, _rotate, _store_parts, check_rope, head_parts


@triton.jit
def _norm_parts(
    first,
    second,
    tail,
    weight_ptr,  # [HEAD_DIM]
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """RMSNorm of each head."""
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if BLOCK_TAIL:
        square += tl.sum(tail * tail, axis=1)
    scale = (1.0 / tl.sqrt(square / HEAD_DIM + eps))[:, None]
    row, one = tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
    first_weight, second_weight, tail_weight = _load_parts(
        weight_ptr, row, one, HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL
    )
    return first * scale * first_weight, second * scale * second_weight, tail * scale * tail_weight


@triton.jit
def _load_rotated(
    ptr,  # at one token
    rows,  # [BLOCK_HEADS] offset of each head, int64
    mask_rows,  # [BLOCK_HEADS]
    cos,
    sin,
    norm_ptr,  # [HEAD_DIM], read if NORM
    eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """The parts of each head, as ``_load_parts`` has them, normed if NORM, then rotated."""
    first, second, tail = _load_parts(ptr, rows, mask_rows, HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL)
    if NORM:
        first, second, tail = _norm_parts(
            first, second, tail, norm_ptr, eps, HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL
        )
    first, second = _rotate(first, second, cos, sin)
    return first, second, tail


@triton.jit
def _larger(a, b):
    """The maximum, NaN if either is: tl.maximum may pass over a NaN, but 0 * NaN is one."""
    return tl.maximum(a, b) + (a + b) * 0.0


@triton.jit
def _rope_and_cache_write_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    v_ptr,  # [num_tokens, num_kv_heads, HEAD_DIM]
    cos_ptr,  # [max_positions, HALF]
    sin_ptr,  # [max_positions, HALF]
    positions_ptr,  # [num_tokens]
    slot_mapping_ptr,  # [num_tokens]
    q_norm_ptr,  # [HEAD_DIM], read if Q_NORM
    k_norm_ptr,  # [HEAD_DIM], read if K_NORM
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_pages_ptr,  # [num_pages, page_size, num_kv_heads, HEAD_DIM]
    v_pages_ptr,  # the same
    k_scale_ptr,  # [num_pages, page_size, num_kv_heads], written if LIMIT
    v_scale_ptr,  # the same
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    num_heads,
    num_kv_heads,
    page_shift,  # log2(page_size)
    eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    LIMIT: tl.constexpr,  # largest code, 0 for float pages
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # power of two >= HALF
    BLOCK_TAIL: tl.constexpr,  # power of two >= HEAD_DIM - rotary_dim, 0 for none
    BLOCK_DIM: tl.constexpr,  # power of two >= HEAD_DIM
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_q_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    offs_heads = tl.arange(0, BLOCK_HEADS)
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, token, HALF, BLOCK_HALF)
    if block < num_q_blocks:
        heads = (block * BLOCK_HEADS + offs_heads).to(tl.int64)
        mask_heads = heads < num_heads
        first, second, tail = _load_rotated(
            q_ptr + token * q_token_stride, heads * q_head_stride, mask_heads, cos, sin, q_norm_ptr, eps, Q_NORM,
            HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
        )  # fmt: skip
        _store_parts(
            out_ptr, (token * num_heads + heads) * HEAD_DIM, mask_heads, first, second, tail,
            HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
        )  # fmt: skip
    else:
        heads = ((block - num_q_blocks) * BLOCK_HEADS + offs_heads).to(tl.int64)
        mask_heads = heads < num_kv_heads
        slot = tl.load(slot_mapping_ptr + token)
        if slot >= 0:
            slot_in_page = slot & ((1 << page_shift) - 1)
            page_row = (slot >> page_shift) * page_stride + slot_in_page * slot_stride
            scale_row = slot * num_kv_heads
            write_heads(
                v_ptr + token * v_token_stride, v_head_stride, v_pages_ptr + page_row, head_stride,
                v_scale_ptr, scale_row, heads, num_kv_heads, LIMIT, HEAD_DIM, BLOCK_DIM,
            )  # fmt: skip
            first, second, tail = _load_rotated(
                k_ptr + token * k_token_stride, heads * k_head_stride, mask_heads, cos, sin, k_norm_ptr, eps, K_NORM,
                HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
            )  # fmt: skip
            if LIMIT:
                largest = _larger(largest_magnitude(first), largest_magnitude(second))
                if BLOCK_TAIL:
                    largest = _larger(largest, largest_magnitude(tail))
                scale = row_scale(largest, LIMIT)
                tl.store(k_scale_ptr + scale_row + heads, scale, mask=mask_heads)
                first, second, tail = (
                    encode(first, scale, LIMIT),
                    encode(second, scale, LIMIT),
                    encode(tail, scale, LIMIT),
                )
            _store_parts(
                k_pages_ptr + page_row, heads * head_stride, mask_heads, first, second, tail,
                HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_TAIL,
            )  # fmt: skip


def _rope_and_cache_write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    eps: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@operator(_rope_and_cache_write_fake, mutates=("k_pages", "v_pages", "k_scale", "v_scale"))
def rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    eps: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Norm each head of q and k (where weights are given), rotate both, and write k and v to their slots.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; any token and head strides, as k and v.
        k: [num_tokens, num_kv_heads, head_dim], dtype of ``q``.
        v: the same shape and dtype as ``k``.
        cos: float32 [max_positions, rotary_dim / 2], rotary_dim <= head_dim.
        sin: the same.
        positions: int32 or int64 [num_tokens], rows of the tables.
        slot_mapping: int64 [num_tokens], page * page_size + slot, each slot at most once; negative writes nothing.
        k_pages: [num_pages, page_size, num_kv_heads, head_dim], a float dtype, int8 or float8_e4m3fn. Written.
        v_pages: the same shape, dtype and strides. Written.
        q_norm: [head_dim], weight of the RMSNorm of each query head, or None for no norm.
        k_norm: the same for each key head.
        k_scale: float32 [num_pages, page_size, num_kv_heads], contiguous, for int8 and float8 pages only. Written.
        v_scale: the same for V. Written.
        eps: of both norms.
        interleaved: pairs are neighbours (2j, 2j + 1), not (j, j + rotary_dim / 2).

    Returns:
        The rotated queries, like ``q``, contiguous.

    Raises:
        KernelInputError: shapes, dtypes or devices do not fit, or (seen on the CPU only) a position lies past
            the tables or a slot past the pages.
    """
    check_rope("q", q, cos, sin, positions)
    check_write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    check_shape("k", k, (num_tokens, None, head_dim))
    check_dtype("k", k, (q.dtype,))
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_shape(name, weight, (head_dim,))
            check_dtype(name, weight, FLOATS)
            check_last_dim_contiguous(**{name: weight})
    check_number("eps", eps)
    check_same_device(q=q, k=k, q_norm=q_norm, k_norm=k_norm)
    if runs_numpy(q, q_norm, k_norm, k_pages):
        inputs = [as_array(t) for t in (q, k, v, cos, sin, positions)]
        norms = [None if t is None else as_array(t) for t in (q_norm, k_norm)]

        def define(k_pages, v_pages, slot_mapping, *scales):
            arguments = [*inputs, slot_mapping, k_pages, v_pages, *norms, *scales]
            return reference.rope_and_cache_write(*arguments, eps=eps, interleaved=interleaved)

        return as_tensor(write_by_definition(define, k_pages, v_pages, slot_mapping, k_scale, v_scale), like=q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    block_heads, block_dim = write_blocks(num_heads, head_dim)
    grid = (num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads))
    _rope_and_cache_write_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slot_mapping,
        q_norm,
        k_norm,
        out,
        as_codes(k_pages),
        as_codes(v_pages),
        k_scale,
        v_scale,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *k_pages.stride()[:3],
        num_heads,
        num_kv_heads,
        k_pages.shape[1].bit_length() - 1,
        eps,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        LIMIT=LIMITS.get(k_pages.dtype, 0),
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
        num_warps=max(1, block_heads * block_dim // 256),
        **head_parts(head_dim, cos.shape[1]),
    )
    return out
