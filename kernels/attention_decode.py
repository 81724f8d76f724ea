"""Attention of one new token a sequence over its paged K/V: split over the keys, then merged by log-sum-exp.

    split s:  o_s = softmax(scores_s).V_s,  lse_s = log2(sum_j 2^score_j)
    merge:    out = sum_s 2^(lse_s - max) o_s / sum_s 2^(lse_s - max),   lse = max + log2(sum_s 2^(lse_s - max))

Layout: q [num_seqs, num_heads, head_dim], the newest token of each sequence, at position seq_len - 1; K/V in pages as
``attention_common`` says.
A split's length is a power of two that follows from the sequence's own length (its reach, with a window): MIN_SPLIT
tokens, doubled until MAX_SPLITS splits suffice. So a sequence is cut alike in every batch and merged in the same order,
and its bits depend on nothing else. The grid follows from shapes alone (the table's width bounds the length), so a
CUDA graph can be replayed with other lengths; programs past a sequence's last split leave at once.
One program of the first kernel owns one split, one K/V head and up to 64 of its query heads; a sequence of one split is
finished there. One program of the second owns one query head of one sequence.
Numerics: partial values and sums in float32; one rounding at the end.
Moves: K/V once, and 8 x head_dim bytes a query head and split for the partial results: bandwidth-bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .attention_common import (
    Attended,
    attend,
    attention_kv,
    block_dim,
    check_attention,
    load_columns,
    log2_sum,
    natural,
    no_keys,
    normalized,
    score_rule,
    store_columns,
    target,
)
from .backend import as_array, as_tensor, runs_numpy
from .checks import check, check_sequences
from .operators import operator
from .paged_checks import check_keys_in_pages
from .paged_common import compact_pages, heads_of


class Tile(NamedTuple):
    block_n: int  # keys
    num_warps: int
    num_stages: int


# (target, bytes an element of q) -> largest head_dim: tile. Not chosen by length: a row's bits depend on block_n.
TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("interpreter", 2): {256: Tile(32, 4, 1)},
    ("interpreter", 4): {256: Tile(32, 4, 1)},
    ("sm90", 2): {128: Tile(64, 4, 5), 256: Tile(32, 4, 5)},
    ("sm90", 4): {128: Tile(16, 4, 3), 256: Tile(16, 4, 2)},
    ("sm80", 2): {128: Tile(64, 4, 5), 256: Tile(32, 4, 5)},
    ("sm80", 4): {128: Tile(16, 4, 3), 256: Tile(16, 4, 2)},
    ("hip", 2): {128: Tile(64, 4, 1), 256: Tile(32, 4, 1)},
    ("hip", 4): {128: Tile(32, 4, 1), 256: Tile(16, 4, 1)},
}

# target -> (MIN_SPLIT in tokens, a multiple of every BLOCK_N; MAX_SPLITS)
SPLITS = {"interpreter": (64, 4), "sm90": (256, 32), "sm80": (256, 32), "hip": (256, 32)}

MERGE_SPLITS = 16  # partial results that the merge holds at once


def decode_tile(target_name: str, itemsize: int, head_dim: int) -> Tile:
    tiles = TILES[target_name, itemsize]
    return tiles[min(limit for limit in tiles if limit >= head_dim)]


@triton.jit
def _split_sequence(seq_len, window, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first key in reach, where the first split starts, tokens per split, number of splits, at least 1)."""
    first_key = 0
    if window is not None:
        first_key = tl.maximum(seq_len - window, 0)
    start = first_key // BLOCK_N * BLOCK_N
    split_tokens = MIN_SPLIT
    while split_tokens * MAX_SPLITS < seq_len - start:
        split_tokens *= 2
    return first_key, start, split_tokens, tl.maximum(tl.cdiv(seq_len - start, split_tokens), 1)


@triton.jit(do_not_specialize=["grid_splits", "block_table_stride"])  # one code for every width of the table
def _attention_decode_kernel(
    q,  # Heads, one token per sequence
    kv,  # PagedKV
    block_table_ptr,  # [num_seqs, max_pages_per_seq]
    block_table_stride,
    seq_lens_ptr,  # [num_seqs]
    result,  # Attended, written for sequences of one split
    partial,  # Attended with room for grid_splits splits, written for the other sequences
    group,  # query heads per K/V head
    grid_splits,
    rule,  # ScoreRule
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ONE_PAGE: tl.constexpr,
):
    kv_head = (tl.program_id(0) % kv.num_kv_heads).to(tl.int64)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + sequence)
    first_key, start, split_tokens, num_splits = _split_sequence(seq_len, rule.window, BLOCK_N, MIN_SPLIT, MAX_SPLITS)
    if split >= num_splits:
        return

    row_in_group = tl.program_id(0) // kv.num_kv_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_rows = row_in_group < group
    heads = kv_head * group + row_in_group
    q_rows = sequence * q.token_stride + heads * q.head_stride
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    q_tile = load_columns(q.ptr, q_rows, mask_rows, dtype, HEAD_DIM, True)
    positions = tl.zeros([BLOCK_M], tl.int32) + (seq_len - 1)

    block_table_ptr += sequence * block_table_stride
    start += split * split_tokens
    end = tl.minimum(start + split_tokens, seq_len)
    state = attend(
        q_tile, no_keys(BLOCK_M, block_dim(HEAD_DIM)), positions, kv, kv_head, block_table_ptr,
        start, end, first_key, seq_len, rule, HEAD_DIM, BLOCK_N, True, ONE_PAGE,
    )  # fmt: skip

    out_rows = sequence * (kv.num_kv_heads * group) + heads
    values = normalized(state, dtype, kv.v_scale is not None)
    lse = log2_sum(state.row_max, state.row_sum)
    if num_splits == 1:
        store_columns(result.out, out_rows * HEAD_DIM, mask_rows, values, HEAD_DIM)
        tl.store(result.lse + out_rows, natural(lse), mask=mask_rows)
    else:
        partial_rows = out_rows * grid_splits + split
        store_columns(partial.out, partial_rows * HEAD_DIM, mask_rows, values, HEAD_DIM)
        tl.store(partial.lse + partial_rows, lse, mask=mask_rows)


@triton.jit(do_not_specialize=["grid_splits"])
def _merge_splits_kernel(
    partial,  # Attended with room for grid_splits splits
    seq_lens_ptr,  # [num_seqs]
    result,  # Attended
    num_heads,
    grid_splits,
    window,  # None for all keys
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits added at once: fixed, so that the order of addition is
):
    sequence = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + sequence)
    _, _, _, num_splits = _split_sequence(seq_len, window, BLOCK_N, MIN_SPLIT, MAX_SPLITS)
    if num_splits == 1:
        return
    row = sequence * num_heads + tl.program_id(0)
    offs_d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    mask_d = offs_d < HEAD_DIM
    offs_s = tl.arange(0, MAX_SPLITS)
    every_lse = tl.load(partial.lse + row * grid_splits + offs_s, mask=offs_s < num_splits, other=float("-inf"))
    top = tl.max(every_lse, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)  # every score was -inf
    total = tl.sum(tl.exp2(every_lse - shift), axis=0)
    acc = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        mask_s = splits < num_splits
        rows = row * grid_splits + splits
        weights = tl.exp2(tl.load(partial.lse + rows, mask=mask_s, other=float("-inf")) - shift)
        ptrs = partial.out + rows[:, None] * HEAD_DIM + offs_d[None, :]
        values = tl.load(ptrs, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
        acc += tl.sum(weights[:, None] * values, axis=0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(result.out + row * HEAD_DIM + offs_d, acc.to(result.out.dtype.element_ty), mask=mask_d)
    tl.store(result.lse + row, natural(log2_sum(top, total)))


def _attention_decode_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(q.shape[:2], dtype=torch.float32, device=q.device),
    )


@operator(_attention_decode_fake)
def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest token of each sequence over all its keys, which the pages already hold.

    Args:
        q: [num_seqs, num_heads, head_dim], float32, float16 or bfloat16, last dimension contiguous; head_dim to 256.
        k_pages: [num_pages, page_size, num_kv_heads, head_dim]; page_size 16 to 256, a power of two; the dtype of q
            (any float if q is float32), or int8 or float8_e4m3fn codes.
        v_pages: the same shape, dtype and strides.
        block_table: int32 [num_seqs, max_pages_per_seq]; entries the query cannot reach may be anything. Its width
            bounds the grid and the workspace (num_seqs x num_heads x splits x head_dim float32, 32 splits at most).
        seq_lens: int32 [num_seqs], keys present in tokens, the newest included; 0 for a sequence that sits out.
        k_scale: float32 [num_pages, page_size, num_kv_heads], contiguous; with codes only: value = code * scale.
        v_scale: the same for V.
        softmax_scale: multiplies every score; positive, commonly 1 / sqrt(head_dim).
        sliding_window: keys the query sees, its own included, in tokens; 0 for all.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for none.

    Returns:
        (out like q, contiguous; lse float32 [num_seqs, num_heads], natural log). Rows without a key: 0 and -inf.

    Raises:
        KernelInputError: shapes, dtypes, devices or numbers do not fit. That lengths and page numbers fit is checked
            for CPU tensors only: on a GPU it would make every call wait for the device.
    """
    check_attention(
        q, k_pages, v_pages, block_table, seq_lens, softmax_scale, sliding_window, softcap, k_scale, v_scale
    )
    num_seqs, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_pages.shape
    check(
        block_table.shape[0] == num_seqs,
        f"{num_seqs} query tokens, {block_table.shape[0]} sequences",
        "decode takes one token a sequence",
        "Call attention_prefill for several",
    )
    check_sequences(num_seqs)
    if q.device.type == "cpu":
        first_keys = (seq_lens - sliding_window).clamp(min=0) if sliding_window else torch.zeros_like(seq_lens)
        check_keys_in_pages(block_table, seq_lens, first_keys, k_pages.shape[0], page_size)
    if runs_numpy(q, k_pages):
        if k_pages.dtype not in (torch.float32, torch.float16, torch.int8) or k_pages.device.type != "cpu":
            k_pages, v_pages, k_scale, v_scale, block_table = compact_pages(
                k_pages, v_pages, k_scale, v_scale, block_table=block_table
            )
        values, sums = reference.attention_decode(
            as_array(q),
            as_array(k_pages),
            as_array(v_pages),
            as_array(block_table),
            as_array(seq_lens),
            None if k_scale is None else as_array(k_scale),
            None if v_scale is None else as_array(v_scale),
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        return as_tensor(values, like=q), as_tensor(sums, like=q, dtype=torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if num_seqs == 0:
        return out, lse
    tile = decode_tile(target(q.device), q.element_size(), head_dim)
    min_split, max_splits = SPLITS[target(q.device)]
    reach = block_table.shape[1] * page_size
    if sliding_window:
        reach = min(reach, sliding_window + tile.block_n - 1)
    grid_splits = max(1, min(max_splits, triton.cdiv(reach, min_split)))
    partial = torch.empty((num_seqs, num_heads, grid_splits, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((num_seqs, num_heads, grid_splits), dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    rule = score_rule(softmax_scale, sliding_window, softcap)
    _attention_decode_kernel[(num_kv_heads * triton.cdiv(group, block_m), grid_splits, num_seqs)](
        heads_of(q),
        attention_kv(k_pages, v_pages, k_scale, v_scale),
        block_table,
        block_table.stride(0),
        seq_lens,
        Attended(out, lse),
        Attended(partial, partial_lse),
        group,
        grid_splits,
        rule,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        MIN_SPLIT=min_split,
        MAX_SPLITS=max_splits,
        ONE_PAGE=page_size >= tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if grid_splits > 1:
        _merge_splits_kernel[(num_heads, num_seqs)](
            Attended(partial, partial_lse),
            seq_lens,
            Attended(out, lse),
            num_heads,
            grid_splits,
            rule.window,
            HEAD_DIM=head_dim,
            BLOCK_N=tile.block_n,
            MIN_SPLIT=min_split,
            MAX_SPLITS=max_splits,
            BLOCK_S=min(MERGE_SPLITS, max_splits),
            num_warps=4,
        )
    return out, lse
