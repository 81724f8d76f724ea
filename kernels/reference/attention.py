"""Attention over paged K/V: out = softmax(cap(softmax_scale * q.K^T) + mask).V (Vaswani et al., 2017, equation 1).

Shapes, for both functions:
    q                 [num_tokens, num_heads, head_dim]; query head h reads K/V head h // (num_heads / num_kv_heads)
    k_pages, v_pages  [num_pages, page_size, num_kv_heads, head_dim]; times k_scale, v_scale
                      [num_pages, page_size, num_kv_heads] where those are given
    block_table       [num_seqs, max_pages_per_seq]: key j of a sequence is slot j % page_size of page j // page_size
    seq_lens          [num_seqs]: keys present, those of this step's queries included
    query_start_loc   [num_seqs + 1]: sequence i owns the tokens query_start_loc[i] .. query_start_loc[i + 1]
Returns out like q, and lse [num_tokens, num_heads], the natural log of the sum of the exponentials of the scores.
A query at position p sees the keys p - sliding_window < j <= p (all j <= p if sliding_window is 0).
softcap > 0 replaces a score s by softcap * tanh(s / softcap). A row that sees no key gives 0 and -inf.
"""

import numpy as np

ROWS = 256  # query tokens whose scores exist at once


def attention_prefill(
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    query_start_loc: np.ndarray,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The queries of a sequence are its last tokens: token i of Q stands at position seq_len - Q + i."""
    dtype = np.result_type(q.dtype, np.float32)
    out = np.zeros(q.shape, dtype)
    lse = np.full(q.shape[:2], -np.inf, dtype)
    ends = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        position = length - (ends[i + 1] - ends[i])
        base = max(0, position - sliding_window + 1) if sliding_window else 0
        k = _gather(k_pages, k_scale, block_table[i], base, length, dtype)
        v = _gather(v_pages, v_scale, block_table[i], base, length, dtype)
        for start in range(ends[i], ends[i + 1], ROWS):
            rows = slice(start, min(start + ROWS, ends[i + 1]))
            positions = np.arange(position + rows.start - ends[i], position + rows.stop - ends[i])
            first = max(base, positions[0] - sliding_window + 1) if sliding_window else 0
            keys = np.arange(first, positions[-1] + 1)
            if keys.size:
                near = slice(first - base, positions[-1] + 1 - base)
                visible = keys <= positions[:, None]
                if sliding_window:
                    visible &= keys > positions[:, None] - sliding_window
                out[rows], lse[rows] = _attend(q[rows].astype(dtype), k[near], v[near], visible, softmax_scale, softcap)
    return out, lse


def attention_decode(
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    arrivals: np.ndarray | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """One query token per sequence, its newest: q is [num_seqs, num_heads, head_dim]. ``arrivals`` stays as it is."""
    return attention_prefill(
        q,
        k_pages,
        v_pages,
        block_table,
        seq_lens,
        np.arange(len(seq_lens) + 1),
        k_scale,
        v_scale,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )


def _gather(
    pages: np.ndarray, scale: np.ndarray | None, block_table: np.ndarray, start: int, end: int, dtype: np.dtype
) -> np.ndarray:
    """Keys start .. end of one sequence, [end - start, num_kv_heads, head_dim]; pages outside are not looked at."""
    page_size = pages.shape[1]
    first, last = start // page_size, -(-end // page_size)
    table = block_table[first:last]
    keys = slice(start - first * page_size, end - first * page_size)
    values = pages[table].reshape(-1, *pages.shape[2:])[keys].astype(dtype, copy=False)
    return values if scale is None else values * scale[table].reshape(-1, pages.shape[2])[keys][..., None].astype(dtype)


def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, softmax_scale: float, softcap: float
) -> tuple[np.ndarray, np.ndarray]:
    """q [Q, num_heads, head_dim], k and v [S, num_kv_heads, head_dim], visible [Q, S] -> out like q, lse."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, group = k.shape[1], num_heads // k.shape[1]
    # [num_kv_heads, group * Q, head_dim] @ [num_kv_heads, head_dim, S]
    grouped = q.reshape(num_tokens, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    scores = grouped.reshape(num_kv_heads, -1, head_dim) @ k.transpose(1, 2, 0) * q.dtype.type(softmax_scale)
    if softcap:
        scores = q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))
    scores = np.where(visible, scores.reshape(num_kv_heads, group, num_tokens, -1), -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = np.sum(weights, axis=-1, keepdims=True)
    seen = total != 0  # a NaN stays one
    mixed = weights.reshape(num_kv_heads, group * num_tokens, -1) @ v.transpose(1, 0, 2)
    out = np.where(seen, mixed.reshape(num_kv_heads, group, num_tokens, head_dim) / np.where(seen, total, 1), 0)
    lse = np.where(seen, top + np.log(np.where(seen, total, 1)), -np.inf)[..., 0]
    return out.transpose(2, 0, 1, 3).reshape(q.shape), lse.transpose(2, 0, 1).reshape(num_tokens, num_heads)
