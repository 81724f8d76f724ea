"""Attention of one new token per sequence over its paged K/V: split over the keys, then merged by log-sum-exp.

    split s:  o_s = softmax(scores_s).V_s,  lse_s = log2(sum_j 2^score_j)
    merge:    out = sum_s 2^(lse_s - max) o_s / sum_s 2^(lse_s - max),   lse = max + log2(sum_s 2^(lse_s - max))

Layout: q [num_seqs, num_heads, head_dim] holds the newest token of each sequence, at position seq_len - 1. K/V lie in
pages as in ``attention_common``.
Splits: a split is MIN_SPLIT tokens long, doubled until MAX_SPLITS splits hold all keys in reach. The length depends on
the sequence's own length and on the head counts alone. So a sequence is cut the same way in every batch and merged in
the same order, and its bits do not depend on its neighbours.
Grid: it follows from shapes alone (the table's width bounds the length), so a CUDA graph can be replayed with other
lengths. Programs past a sequence's last split exit at once.
One program of the first kernel owns one split, one K/V head and up to 64 of its query heads. It also finishes a
sequence of one split. One program of the second kernel owns one query head of one sequence.
Numerics: partial values and sums are float32, rounded once at the end.
Moves: K/V once, and 8 x head_dim bytes per query head and split for the partial results: bandwidth-bound.
"""

from __future__ import annotations

from typing import Any

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
    check_reach,
    load_columns,
    log2_sum,
    natural,
    no_keys,
    normalized,
    result_like_q,
    score_rule,
    store_columns,
)
from .checks import check, check_sequences
from .kernel import Launch, kernel, launch, scratch
from .launch import configuration
from .paged_common import heads_of, read_by_definition

MERGE_SPLITS = 16  # partial results that one step of the merge adds


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


@triton.jit(do_not_specialize=["block_table_stride"])  # one code for every width of the table
def _attention_decode_kernel(
    q,  # Heads, one token per sequence
    kv,  # PagedKV
    block_table_ptr,  # [num_seqs, max_pages_per_seq]
    block_table_stride,
    seq_lens_ptr,  # [num_seqs]
    result,  # Attended, written for sequences of one split
    partial,  # Attended with room for one split per program of axis 1, written for the other sequences
    group,  # query heads per K/V head
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
        partial_rows = out_rows * tl.num_programs(1) + split
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
    BLOCK_S: tl.constexpr,  # splits per step; fixed, since it determines the order of addition
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


def most_splits(keys: int, num_kv_heads: int, device: torch.device | None = None) -> int:
    """The most splits that a sequence of ``keys`` keys can have. Without a device, for a data-centre GPU."""
    splits = configuration("attention_splits", device, num_kv_heads=num_kv_heads)
    return max(1, min(splits["MAX_SPLITS"], triton.cdiv(keys, splits["MIN_SPLIT"])))


def _check(q: Tensor, k_pages: Tensor, block_table: Tensor, seq_lens: Tensor, sliding_window: int, **rest: Any) -> None:
    check_attention(q, k_pages, block_table=block_table, seq_lens=seq_lens, sliding_window=sliding_window, **rest)
    num_seqs = q.shape[0]
    check(
        block_table.shape[0] == num_seqs,
        f"{num_seqs} query tokens, {block_table.shape[0]} sequences",
        "decode takes one token per sequence",
        "Call attention_prefill for several",
    )
    check_sequences(num_seqs)
    if q.device.type == "cpu":
        check_reach(1, seq_lens, block_table, k_pages, sliding_window)


@kernel(checks=_check, output=result_like_q, definition=reference.attention_decode, by_definition=read_by_definition)
def attention_decode(
    out: tuple[Tensor, Tensor],
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
) -> list[Launch]:
    """Attention of the newest token of each sequence over all its keys, which the pages already hold.

    Args:
        q: [num_seqs, num_heads, head_dim], float32, float16 or bfloat16, last dimension contiguous; head_dim to 256.
        k_pages: [num_pages, page_size, num_kv_heads, head_dim]; page_size 16 to 256, a power of two; the dtype of q
            (any float if q is float32), or int8 or float8_e4m3fn codes.
        v_pages: the same shape, dtype and strides.
        block_table: int32 [num_seqs, max_pages_per_seq]. Entries that the query cannot reach may be anything. The
            table's width bounds the grid and the workspace (num_seqs x num_heads x splits x head_dim float32).
        seq_lens: int32 [num_seqs], number of keys, the newest token's included; 0 for a sequence without a query.
        k_scale: float32 [num_pages, page_size, num_kv_heads], contiguous; with codes only: value = code * scale.
        v_scale: the same for V.
        softmax_scale: multiplies every score; positive, commonly 1 / sqrt(head_dim).
        sliding_window: how many keys the query sees, its own included; 0 for all.
        softcap: a score becomes softcap * tanh(score / softcap); 0 for none.

    Returns:
        (out like q, contiguous; lse float32 [num_seqs, num_heads], natural log). Rows without a key are 0 and -inf.

    Raises:
        KernelInputError: shapes, dtypes, devices or numbers do not fit. Lengths and page numbers are checked for CPU
            tensors only, since reading them from a GPU would make every call wait for the device.
    """
    num_seqs, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_pages.shape
    tile = configuration("attention_decode", q.device, itemsize=q.element_size(), head_dim=head_dim)
    splits = configuration("attention_splits", q.device, num_kv_heads=num_kv_heads)
    reach = block_table.shape[1] * page_size
    if sliding_window:
        reach = min(reach, sliding_window + tile["BLOCK_N"] - 1)
    grid_splits = most_splits(reach, num_kv_heads, q.device)
    group = num_heads // num_kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    rule = score_rule(softmax_scale, sliding_window, softcap)
    result = Attended(*out)
    partial = Attended(
        scratch(num_seqs, num_heads, grid_splits, head_dim, dtype=torch.float32, device=q.device),
        scratch(num_seqs, num_heads, grid_splits, dtype=torch.float32, device=q.device),
    )
    attended = launch(
        _attention_decode_kernel,
        (num_kv_heads * triton.cdiv(group, block_m), grid_splits, num_seqs),
        heads_of(q),
        attention_kv(k_pages, v_pages, k_scale, v_scale),
        block_table,
        block_table.stride(0),
        seq_lens,
        result,
        partial,
        group,
        rule,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        ONE_PAGE=page_size >= tile["BLOCK_N"],
        **tile,
        **splits,
    )
    if grid_splits == 1:
        return [attended]
    merged = launch(
        _merge_splits_kernel,
        (num_heads, num_seqs),
        partial,
        seq_lens,
        result,
        num_heads,
        grid_splits,
        rule.window,
        HEAD_DIM=head_dim,
        BLOCK_N=tile["BLOCK_N"],
        BLOCK_S=min(MERGE_SPLITS, splits["MAX_SPLITS"]),
        num_warps=4,
        **splits,
    )
    return [attended, merged]
