"""Causal attention of many query tokens over paged K/V: ragged batches, grouped heads, chunked prefill.

    out = softmax(cap(softmax_scale * q.K^T) + mask).V     for a query at position p: keys p - window < j <= p
    lse = log(sum_j exp(score_j))

Layout: q [num_tokens, num_heads, head_dim] holds the queries of all sequences one after another; query_start_loc
[num_seqs + 1] says where each begins. K/V lie in pages as in ``attention_common``. The Q queries of a sequence are its
last tokens: query i is at position seq_len - Q + i. So a chunk of a longer prompt needs nothing but its seq_len.
One program owns BLOCK_M rows of one sequence and one K/V head. Row r of a sequence is token r // group, head r % group
of the group, so any group fills the tile and one load of K/V serves all its heads. The program walks the keys in three
stretches: tiles cut by the window, tiles that every row sees whole (no mask), tiles on the diagonal.
Grid: it follows from shapes alone, and a program finds its sequence by binary search in query_start_loc. So a CUDA
graph can be replayed with other lengths. Blocks are issued last first, which within a sequence is longest first.
Tokens past query_start_loc[-1] belong to no sequence; their results are 0 and -inf.
Bits: a row's bits depend on its own query and keys alone, not on the chunk, the batch, where its pages lie or their
size. This holds for finite values: a NaN or an infinity in V that only other rows of the block see also reaches the
row, since 0 times it is NaN.
Moves: q and out once, K/V once per BLOCK_M rows (mostly from L2), for 4 x head_dim flops per visible pair of query and
key: compute-bound beyond a few hundred keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_prefill_hopper as hopper
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
from .attention_prefill_blocks import Sequences, count_blocks, find_sequence, first_block
from .backend import as_array
from .checks import check, check_dtype, check_last_dim_contiguous, check_shape
from .kernel import Launch, kernel, launch
from .launch import configuration
from .paged_common import heads_of, read_by_definition


# One code for every batch. Numbers in a NamedTuple are specialised whatever is said here, so these are not in one.
@triton.jit(do_not_specialize=["block_table_stride", "num_tokens", "num_seqs", "num_blocks"])
def _attention_prefill_kernel(
    q,  # Heads
    kv,  # PagedKV
    sequences,  # Sequences
    block_table_stride,
    result,  # Attended
    num_tokens,
    num_seqs,
    num_blocks,
    group,  # query heads per K/V head
    rule,  # ScoreRule
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_PAGE: tl.constexpr,
):
    kv_head = (tl.program_id(0) % kv.num_kv_heads).to(tl.int64)
    block = num_blocks - 1 - tl.program_id(0) // kv.num_kv_heads
    sequence = find_sequence(sequences.query_start_loc, block, num_seqs, group, BLOCK_M)
    query_start = tl.load(sequences.query_start_loc + sequence)
    query_end = num_tokens
    seq_len = 0
    if sequence < num_seqs:
        query_end = tl.load(sequences.query_start_loc + sequence + 1)
        seq_len = tl.load(sequences.seq_lens + sequence)
    num_rows = (query_end - query_start) * group
    first_row = (block - first_block(sequences.query_start_loc, sequence, group, BLOCK_M)) * BLOCK_M
    if first_row >= num_rows:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    mask_rows = rows < num_rows
    tokens = (query_start + rows // group).to(tl.int64)
    heads = kv_head * group + rows % group
    query_position = seq_len - (query_end - query_start)  # of the sequence's first query
    positions = query_position + rows // group
    nearest = query_position + first_row // group  # least position of the block
    farthest = query_position + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // group

    q_rows = tokens * q.token_stride + heads * q.head_stride
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    q_tile = load_columns(q.ptr, q_rows, mask_rows, dtype, HEAD_DIM, True)
    state = no_keys(BLOCK_M, block_dim(HEAD_DIM))

    block_table_ptr = sequences.block_table + sequence.to(tl.int64) * block_table_stride
    first_key = 0
    end_key = tl.maximum(farthest + 1, 0)
    start = 0
    whole = 0
    diagonal = tl.maximum(nearest + 1, 0) // BLOCK_N * BLOCK_N
    if rule.window is not None:
        first_key = tl.maximum(nearest + 1, rule.window) - rule.window
        start = first_key // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(farthest + 1, rule.window) - rule.window, BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, diagonal)
        state = attend(
            q_tile, state, positions, kv, kv_head, block_table_ptr, start, whole, first_key, end_key,
            rule, HEAD_DIM, BLOCK_N, True, ONE_PAGE,
        )  # fmt: skip
    state = attend(
        q_tile, state, positions, kv, kv_head, block_table_ptr, whole, diagonal, first_key, end_key,
        rule, HEAD_DIM, BLOCK_N, False, ONE_PAGE,
    )  # fmt: skip
    state = attend(
        q_tile, state, positions, kv, kv_head, block_table_ptr, diagonal, end_key, first_key, end_key,
        rule, HEAD_DIM, BLOCK_N, True, ONE_PAGE,
    )  # fmt: skip

    out_rows = tokens * (kv.num_kv_heads * group) + heads
    values = normalized(state, dtype, kv.v_scale is not None)
    store_columns(result.out, out_rows * HEAD_DIM, mask_rows, values, HEAD_DIM)
    tl.store(result.lse + out_rows, natural(log2_sum(state.row_max, state.row_sum)), mask=mask_rows)


def _check_query_start_loc(query_start_loc: Tensor, block_table: Tensor, num_tokens: int) -> None:
    check_shape("query_start_loc", query_start_loc, (block_table.shape[0] + 1,))
    check_dtype("query_start_loc", query_start_loc, (torch.int32,))
    check_last_dim_contiguous(query_start_loc=query_start_loc)
    check(
        query_start_loc.device == block_table.device,
        f"query_start_loc on {query_start_loc.device}, block_table on {block_table.device}",
        "all tensors of one call live on one device",
        "Move them with .to(device)",
    )
    if query_start_loc.device.type == "cpu":
        starts = as_array(query_start_loc)
        check(
            starts[0] == 0 and starts[-1] <= num_tokens and bool((np.diff(starts) >= 0).all()),
            f"query_start_loc is {starts.tolist()} for {num_tokens} tokens",
            "query_start_loc starts at 0, never falls, and ends within the tokens of q",
            "Pass the running sum of the query lengths",
        )


def _check(
    q: Tensor,
    k_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    sliding_window: int,
    **rest: Any,
) -> None:
    check_attention(q, k_pages, block_table=block_table, seq_lens=seq_lens, sliding_window=sliding_window, **rest)
    _check_query_start_loc(query_start_loc, block_table, q.shape[0])
    if q.device.type == "cpu":
        check_reach(query_start_loc.diff(), seq_lens, block_table, k_pages, sliding_window)


@kernel(checks=_check, output=result_like_q, definition=reference.attention_prefill, by_definition=read_by_definition)
def attention_prefill(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Launch:
    """Causal attention of the last tokens of each sequence over all its keys, which the pages already hold.

    Args:
        q: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16, last dimension contiguous; head_dim to 256.
        k_pages: [num_pages, page_size, num_kv_heads, head_dim]; page_size 16 to 256, a power of two; the dtype of q
            (any float if q is float32), or int8 or float8_e4m3fn codes.
        v_pages: the same shape, dtype and strides.
        block_table: int32 [num_seqs, max_pages_per_seq]. Entries that no query can reach may be anything.
        seq_lens: int32 [num_seqs], number of keys, those of these queries included.
        query_start_loc: int32 [num_seqs + 1]. Sequence i owns the tokens query_start_loc[i] to
            query_start_loc[i + 1] - 1.
        k_scale: float32 [num_pages, page_size, num_kv_heads], contiguous; with codes only: value = code * scale.
        v_scale: the same for V.
        softmax_scale: multiplies every score; positive, commonly 1 / sqrt(head_dim).
        sliding_window: how many keys a query sees, its own included; 0 for all.
        softcap: a score becomes softcap * tanh(score / softcap); 0 for none.

    Returns:
        (out like q, contiguous; lse float32 [num_tokens, num_heads], natural log). Rows without a key are 0 and -inf.

    Raises:
        KernelInputError: shapes, dtypes, devices or numbers do not fit. Lengths and page numbers are checked for CPU
            tensors only, since reading them from a GPU would make every call wait for the device.
    """
    sequences = Sequences(query_start_loc, block_table, seq_lens)
    rule = score_rule(softmax_scale, sliding_window, softcap)
    if hopper.serves(q, k_pages, v_pages):
        return hopper.launch_hopper(out, q, k_pages, v_pages, sequences, rule)
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_pages.shape
    tile = configuration("attention_prefill", q.device, itemsize=q.element_size(), head_dim=head_dim)
    group = num_heads // num_kv_heads
    num_seqs = block_table.shape[0]
    num_blocks = count_blocks(num_tokens * group, num_seqs, tile["BLOCK_M"])
    return launch(
        _attention_prefill_kernel,
        (num_blocks * num_kv_heads,),
        heads_of(q),
        attention_kv(k_pages, v_pages, k_scale, v_scale),
        sequences,
        block_table.stride(0),
        Attended(*out),
        num_tokens,
        num_seqs,
        num_blocks,
        group,
        rule,
        HEAD_DIM=head_dim,
        ONE_PAGE=page_size >= tile["BLOCK_N"],
        **tile,
    )
