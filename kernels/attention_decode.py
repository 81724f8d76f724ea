"""Attention of one new token per sequence over its paged K/V: split over the keys, then merged by log-sum-exp.

    split s:  o_s = softmax(scores_s).V_s,  lse_s = log2(sum_j 2^score_j)
    merge:    out = sum_s 2^(lse_s - max) o_s / sum_s 2^(lse_s - max),   lse = max + log2(sum_s 2^(lse_s - max))

Layout: q [num_seqs, num_heads, head_dim] holds the newest token of each sequence, at position seq_len - 1. K/V lie in
pages as in ``attention_common``.
Splits: MAX_SPLITS equal splits of whole tiles hold all keys in reach; fewer where they would be shorter than MIN_SPLIT
tokens. The length depends on the sequence's own length and on the head counts alone. So a sequence is cut the same way
in every batch and merged in the same order, and its bits do not depend on its neighbours.
Grid: it follows from shapes alone (the table's width bounds the length), so a CUDA graph can be replayed with other
lengths. Programs past a sequence's last split exit at once.
One program owns one split, one K/V head and up to 64 of its query heads. The programs that differ only in the split
count themselves in ``arrivals`` as they finish, and the last one merges their results. The counter decides only who
merges: splits are added in their own order.
Numerics: partial values and sums are float32, rounded once at the end.
Moves: K/V once, and 8 x head_dim bytes per query head and split for the partial results: bandwidth-bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from .checks import check, check_dtype, check_same_device, check_sequences, check_shape
from .kernel import Launch, kernel, launch, scratch
from .launch import configuration
from .paged_common import heads_of, read_by_definition


@triton.jit
def _split_sequence(seq_len, window, BLOCK_N: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(first key in reach, where the first split starts, tokens per split, number of splits, at least 1)."""
    first_key = 0
    if window is not None:
        first_key = tl.maximum(seq_len - window, 0)
    start = first_key // BLOCK_N * BLOCK_N
    keys = seq_len - start
    split_tokens = tl.maximum(tl.cdiv(tl.cdiv(keys, MAX_SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    return first_key, start, split_tokens, tl.maximum(tl.cdiv(keys, split_tokens), 1)


class Splits(NamedTuple):
    """What the programs of one call write besides its result, where sequences may have several splits."""

    out: Tensor  # [num_seqs, num_heads, splits, head_dim] float32, of each split alone
    lse: Tensor  # [num_seqs, num_heads, splits] float32, log2
    arrivals: Tensor  # [num_seqs, num_heads] int32, zeros between calls; each program of axis 0 uses one per sequence


@triton.jit
def merge_splits(
    splits,  # Splits
    result,  # Attended
    first_row,  # int64, sequence * num_heads + head
    num_rows,
    num_splits,
    room,  # splits that there is room for
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Write the result of some neighbouring rows, their splits added one after another.

    Loads bypass L1, which does not see what other multiprocessors wrote.
    """
    ROWS: tl.constexpr = 512 // block_dim(HEAD_DIM)
    COUNT: tl.constexpr = 4 if MAX_SPLITS > 4 else MAX_SPLITS  # splits loaded at a time; with more, registers spill
    offs_d = tl.arange(0, block_dim(HEAD_DIM))
    mask_d = (offs_d < HEAD_DIM)[None, :]
    offs_s = tl.arange(0, MAX_SPLITS)
    for start in tl.range(0, num_rows, ROWS, num_stages=1):
        mask_rows = start + tl.arange(0, ROWS) < num_rows
        ends = tl.where(mask_rows, num_splits, 0)
        rows = first_row + start + tl.arange(0, ROWS)
        places = rows * room  # of their first splits
        mask = offs_s[None, :] < ends[:, None]
        every_lse = splits.lse + places[:, None] + offs_s[None, :]
        top = tl.max(tl.load(every_lse, mask=mask, other=float("-inf"), cache_modifier=".cg"), axis=1)
        shift = tl.where(top == float("-inf"), 0.0, top)  # every score was -inf
        acc = tl.zeros([ROWS, block_dim(HEAD_DIM)], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, num_splits, COUNT, num_stages=1):
            lse_ptrs = splits.lse + places + first
            out_ptrs = splits.out + (places + first)[:, None] * HEAD_DIM + offs_d[None, :]
            sums, values = (), ()
            for i in tl.static_range(COUNT):
                present = first + i < ends
                lse = tl.load(lse_ptrs + i, mask=present, other=float("-inf"), cache_modifier=".cg")
                here = present[:, None] & mask_d
                value = tl.load(out_ptrs + i * HEAD_DIM, mask=here, other=0.0, cache_modifier=".cg")
                sums += (lse,)  # type: ignore[assignment]  # a tuple grows
                values += (value,)  # type: ignore[assignment]
            for i in tl.static_range(COUNT):
                weight = tl.exp2(sums[i] - shift)
                total += weight
                acc = tl.fma(values[i], tl.broadcast_to(weight[:, None], acc.shape), acc)
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        store_columns(result.out, rows * HEAD_DIM, mask_rows, acc, HEAD_DIM)
        tl.store(result.lse + rows, natural(log2_sum(top, total)), mask=mask_rows)


@triton.jit(do_not_specialize=["block_table_stride"])  # one code for every width of the table
def _attention_decode_kernel(
    q,  # Heads, one token per sequence
    kv,  # PagedKV
    block_table_ptr,  # [num_seqs, max_pages_per_seq]
    block_table_stride,
    seq_lens_ptr,  # [num_seqs]
    result,  # Attended
    splits,  # Splits with room for one per program of axis 1; None if that is one program
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

    first_head = tl.program_id(0) // kv.num_kv_heads * BLOCK_M
    row_in_group = first_head + tl.arange(0, BLOCK_M)
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

    num_heads = kv.num_kv_heads * group
    out_rows = sequence * num_heads + heads
    values = normalized(state, dtype, kv.v_scale is not None)
    lse = log2_sum(state.row_max, state.row_sum)
    if num_splits == 1:
        store_columns(result.out, out_rows * HEAD_DIM, mask_rows, values, HEAD_DIM)
        tl.store(result.lse + out_rows, natural(lse), mask=mask_rows)
    elif splits is not None:
        room = tl.num_programs(1)
        store_columns(splits.out, (out_rows * room + split) * HEAD_DIM, mask_rows, values, HEAD_DIM)
        tl.store(splits.lse + out_rows * room + split, lse, mask=mask_rows)
        tl.debug_barrier()  # every thread has stored before one of them says so
        arrivals_ptr = splits.arrivals + sequence * num_heads + tl.program_id(0)
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
            tl.store(arrivals_ptr, 0)
            row = sequence * num_heads + (tl.program_id(0) % kv.num_kv_heads * group + first_head)
            rows = tl.minimum(BLOCK_M, group - first_head)
            merge_splits(splits, result, row, rows, num_splits, room, HEAD_DIM, MAX_SPLITS)


@triton.jit
def _zero_kernel(
    numbers_ptr,  # [count] int32
    count,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(numbers_ptr + offs, 0, mask=offs < count)


def most_splits(keys: int, num_kv_heads: int, device: torch.device | None = None) -> int:
    """The most splits that a sequence of ``keys`` keys can have. Without a device, for a data-centre GPU."""
    splits = configuration("attention_splits", device, num_kv_heads=num_kv_heads)
    return max(1, min(splits["MAX_SPLITS"], triton.cdiv(keys, splits["MIN_SPLIT"])))


def _check(
    q: Tensor,
    k_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    arrivals: Tensor | None,
    sliding_window: int,
    **rest: Any,
) -> None:
    check_attention(q, k_pages, block_table=block_table, seq_lens=seq_lens, sliding_window=sliding_window, **rest)
    num_seqs = q.shape[0]
    check(
        block_table.shape[0] == num_seqs,
        f"{num_seqs} query tokens, {block_table.shape[0]} sequences",
        "decode takes one token per sequence",
        "Call attention_prefill for several",
    )
    check_sequences(num_seqs)
    if arrivals is not None:
        _check_arrivals(arrivals, q)
    if q.device.type == "cpu":
        check_reach(1, seq_lens, block_table, k_pages, sliding_window)


def _check_arrivals(arrivals: Tensor, q: Tensor) -> None:
    check_shape("arrivals", arrivals, tuple(q.shape[:2]))
    check_dtype("arrivals", arrivals, (torch.int32,))
    check_same_device(q=q, arrivals=arrivals)
    check(arrivals.is_contiguous(), f"arrivals has strides {arrivals.stride()}", "it is contiguous", "Copy it")
    if q.device.type == "cpu":
        found = int(arrivals.count_nonzero())
        check(found == 0, f"arrivals has {found} numbers that are not 0", "it is 0 between calls", "Pass zeros")


@kernel(
    checks=_check,
    output=result_like_q,
    definition=reference.attention_decode,
    mutates=("arrivals",),
    by_definition=read_by_definition,
)
def attention_decode(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    arrivals: Tensor | None = None,
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
        arrivals: int32 [num_seqs, num_heads] of zeros, contiguous, zeros again afterwards: it counts the programs that
            have finished. It saves the launch that makes such zeros. Calls, and graphs of calls, that may run at the
            same time need one each.
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
    lengths = configuration("attention_splits", q.device, num_kv_heads=num_kv_heads)
    reach = block_table.shape[1] * page_size
    if sliding_window:
        reach = min(reach, sliding_window + tile["BLOCK_N"] - 1)
    grid_splits = most_splits(reach, num_kv_heads, q.device)
    group = num_heads // num_kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    launches, splits = [], None
    if grid_splits > 1:
        if arrivals is None:
            count, arrivals = num_seqs * num_heads, scratch(num_seqs, num_heads, dtype=torch.int32, device=q.device)
            launches.append(launch(_zero_kernel, (triton.cdiv(count, 1024),), arrivals, count, BLOCK=1024))
        splits = Splits(
            scratch(num_seqs, num_heads, grid_splits, head_dim, dtype=torch.float32, device=q.device),
            scratch(num_seqs, num_heads, grid_splits, dtype=torch.float32, device=q.device),
            arrivals,
        )
    attended = launch(
        _attention_decode_kernel,
        (num_kv_heads * triton.cdiv(group, block_m), grid_splits, num_seqs),
        heads_of(q),
        attention_kv(k_pages, v_pages, k_scale, v_scale),
        block_table,
        block_table.stride(0),
        seq_lens,
        Attended(*out),
        splits,
        group,
        score_rule(softmax_scale, sliding_window, softcap),
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        ONE_PAGE=page_size >= tile["BLOCK_N"],
        **tile,
        **lengths,
    )
    return [*launches, attended]
