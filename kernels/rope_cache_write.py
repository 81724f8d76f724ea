"""Rotary embedding fused with the norms of Q and K and the write of K and V to their pages.

    q = rope(norm(q)),  pages[slot] = rope(norm(k)), v          norm(x) = x * weight / sqrt(mean(x^2) + eps)

Layout: as in ``rope`` and ``paged_cache``. A token's slot is slot_mapping[token]; a token of negative slot is not
written.
One program owns one token and a block of its heads. The first blocks norm and rotate q. The other blocks norm and
rotate k and write it with v to the token's slot, as codes where the pages hold codes (paged_common).
Numerics: norm and rotation are float32, rounded once: to the dtype of the result or the pages, or to codes.
Moves: 2 x head_dim x itemsize bytes per head for about 3 flops per element (8 with the norm): bandwidth-bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import FLOATS, check_dtype, check_last_dim_contiguous, check_number, check_same_device, check_shape
from .kernel import Launch, kernel, launch, like
from .paged_checks import check_write
from .paged_common import (
    LIMITS,
    as_codes,
    encode,
    heads_of,
    largest_magnitude,
    paged_kv,
    row_scale,
    slot_offset,
    write_blocks,
    write_by_definition,
    write_heads,
)
from .rope import Angles, Parts, check_rope, load_angles, load_parts, rotate, store_parts


class HeadNorms(NamedTuple):
    """The RMSNorms of the heads of q and of k."""

    q_weight: Tensor | None  # [HEAD_DIM], None for no norm
    k_weight: Tensor | None  # the same
    eps: float


@triton.jit
def _norm(parts, weight_ptr, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """RMSNorm of each head."""
    first, second, tail = parts
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if HEAD_DIM > 2 * HALF:
        square += tl.sum(tail * tail, axis=1)
    scale = (1.0 / tl.sqrt(square / HEAD_DIM + eps))[:, None]
    row, one = tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
    weight = load_parts(weight_ptr, row, one, HEAD_DIM, HALF, INTERLEAVED)
    return Parts(first * scale * weight.first, second * scale * weight.second, tail * scale * weight.tail)


@triton.jit
def _largest(parts, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """[BLOCK_HEADS] the largest magnitude of each head, NaN if it holds an infinity or a NaN."""
    largest = _larger(largest_magnitude(parts.first), largest_magnitude(parts.second))
    if HEAD_DIM > 2 * HALF:
        largest = _larger(largest, largest_magnitude(parts.tail))
    return largest


@triton.jit
def _larger(a, b):
    """The maximum, NaN if either is NaN: tl.maximum may ignore a NaN, but 0 * NaN is NaN."""
    return tl.maximum(a, b) + (a + b) * 0.0


@triton.jit
def _rope_and_cache_write_kernel(
    q,  # Heads
    k,  # Heads
    v,  # Heads
    angles,  # Angles
    norms,  # HeadNorms
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    kv,  # PagedKV
    slot_mapping_ptr,  # [num_tokens]
    num_heads,
    LIMIT: tl.constexpr,  # largest code, 0 for float pages
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_q_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    offs_heads = tl.arange(0, BLOCK_HEADS)
    cos, sin = load_angles(angles, token, HALF)
    if block < num_q_blocks:
        heads = (block * BLOCK_HEADS + offs_heads).to(tl.int64)
        mask_heads = heads < num_heads
        q_ptr = q.ptr + token * q.token_stride
        parts = load_parts(q_ptr, heads * q.head_stride, mask_heads, HEAD_DIM, HALF, INTERLEAVED)
        if norms.q_weight is not None:
            parts = _norm(parts, norms.q_weight, norms.eps, HEAD_DIM, HALF, INTERLEAVED)
        out_rows = (token * num_heads + heads) * HEAD_DIM
        store_parts(out_ptr, out_rows, mask_heads, rotate(parts, cos, sin), HEAD_DIM, HALF, INTERLEAVED)
    else:
        heads = ((block - num_q_blocks) * BLOCK_HEADS + offs_heads).to(tl.int64)
        mask_heads = heads < kv.num_kv_heads
        slot = tl.load(slot_mapping_ptr + token)
        if slot >= 0:
            write_heads(v, token, kv.v_pages, kv.v_scale, kv, slot, heads, LIMIT, HEAD_DIM)
            k_ptr = k.ptr + token * k.token_stride
            parts = load_parts(k_ptr, heads * k.head_stride, mask_heads, HEAD_DIM, HALF, INTERLEAVED)
            if norms.k_weight is not None:
                parts = _norm(parts, norms.k_weight, norms.eps, HEAD_DIM, HALF, INTERLEAVED)
            parts = rotate(parts, cos, sin)
            if LIMIT:
                scale = row_scale(_largest(parts, HEAD_DIM, HALF), LIMIT)
                tl.store(kv.k_scale + slot * kv.num_kv_heads + heads, scale, mask=mask_heads)
                first, second, tail = parts
                first, second = encode(first, scale, LIMIT), encode(second, scale, LIMIT)
                parts = Parts(first, second, encode(tail, scale, LIMIT))
            slot_ptr = kv.k_pages + slot_offset(slot, kv)
            store_parts(slot_ptr, heads * kv.head_stride, mask_heads, parts, HEAD_DIM, HALF, INTERLEAVED)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
    **pages: Any,
) -> None:
    check_rope("q", q, cos, sin, positions)
    check_write(k, v, **pages)
    num_tokens, _, head_dim = q.shape
    check_shape("k", k, (num_tokens, None, head_dim))
    check_dtype("k", k, (q.dtype,))
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_shape(name, weight, (head_dim,))
            check_dtype(name, weight, FLOATS)
            check_last_dim_contiguous(**{name: weight})
    check_number("eps", eps)
    check_same_device(q=q, k=k, q_norm=q_norm, k_norm=k_norm)


@kernel(
    checks=_check,
    output=like("q"),
    definition=reference.rope_and_cache_write,
    mutates=("k_pages", "v_pages", "k_scale", "v_scale"),
    by_definition=write_by_definition,
)
def rope_and_cache_write(
    out: Tensor,
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
) -> Launch:
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
        KernelInputError: shapes, dtypes or devices do not fit, or (checked on the CPU only) a position lies past
            the tables or a slot past the pages.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_heads, block_dim = write_blocks(num_heads, head_dim)
    return launch(
        _rope_and_cache_write_kernel,
        (num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(k.shape[1], block_heads)),
        heads_of(q),
        heads_of(k),
        heads_of(v),
        Angles(cos, sin, positions),
        HeadNorms(q_norm, k_norm, eps),
        out,
        paged_kv(as_codes(k_pages), as_codes(v_pages), k_scale, v_scale),
        slot_mapping,
        num_heads,
        LIMIT=LIMITS.get(k_pages.dtype, 0),
        HEAD_DIM=head_dim,
        HALF=cos.shape[1],
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        num_warps=max(1, block_heads * block_dim // 256),
    )
