"""Attention over dense K/V, [batch, num_kv_heads, num_keys, head_dim], by the kernels that read pages.

Dense K/V are a pool of pages as they lie: a page is PAGE_SIZE rows, and a page may start at any row. So the page stride
is one row, pages overlap, and a sequence may start at any key, behind padding for example. The block table is all that
is made.
Copied: K and V, if their strides differ, if rows do not follow each other at equal distances, or if fewer than
PAGE_SIZE rows are there. On the CPU also where the last page would end beyond the tensor's memory. Compiled kernels
read no key from a sequence's end on, so on a GPU a last page may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflama.kernels import attention_decode, attention_prefill, current_swaps
from rooflama.kernels.kernel import is_traced, replays

PAGE_SIZE = 128  # at least any BLOCK_N of the attention kernels, so that a tile reads one entry of the block table


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None = None,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention; the queries of a sequence are its last tokens.

    Args:
        query: [batch, num_heads, num_queries, head_dim].
        key: [batch, num_kv_heads, num_keys, head_dim], the dtype of query (any float if that is float32).
        value: the same shape and dtype.
        seen: the keys that each sequence has. None: all. int32 [batch, 1, 1, 2]: those from seen[..., 0] on,
            seen[..., 1] of them. bool [batch, 1, 1, num_keys], for one query only: those where it is True; they are
            copied next to each other.
        softmax_scale, sliding_window, softcap: as in ``attention_prefill``.

    Returns:
        [batch, num_queries, num_heads, head_dim], contiguous. A query that sees no key gives 0.

    Raises:
        KernelInputError: shapes, dtypes, devices or numbers do not fit, or a tensor requires grad.
    """
    if is_traced():
        return _operator(query, key, value, seen, softmax_scale, sliding_window, softcap)
    if seen is not None and seen.dtype == torch.bool:
        key, value, seen = _gathered(key, value, seen[:, 0, 0])
    if seen is None:
        first, seq_lens = None, torch.full(query.shape[:1], key.shape[2], dtype=torch.int32, device=key.device)
    else:
        first, seq_lens = seen[:, 0, 0, 0], seen[:, 0, 0, 1].contiguous()
    return attend_pages(
        query.transpose(1, 2),
        *as_pages(key, value, first),
        seq_lens,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )


def attend_pages(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any
) -> Tensor:
    """Attention of the last queries of each sequence, as many of each: [batch, num_queries, num_heads, head_dim].

    Args:
        options: softmax_scale, sliding_window, softcap.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    tokens = query.reshape(batch * num_queries, num_heads, head_dim)
    if num_queries == 1:
        out, _ = attention_decode(tokens, k_pages, v_pages, block_table, seq_lens, **options)
    else:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * num_queries
        out, _ = attention_prefill(tokens, k_pages, v_pages, block_table, seq_lens, ends, **options)
    return out.view(query.shape)


@torch.library.custom_op("rooflama::dense_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    softmax_scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """What torch.compile sees: dense tensors, not the pages that overlap in them."""
    return dense_attention(
        query, key, value, seen, softmax_scale=softmax_scale, sliding_window=sliding_window, softcap=softcap
    )


@_operator.register_fake
def _(query, key, value, seen, softmax_scale, sliding_window, softcap):
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def as_pages(
    key: Tensor, value: Tensor, first: Tensor | None = None, most_keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(k_pages, v_pages, block_table) of dense K/V, [batch, num_kv_heads, num_keys, head_dim].

    Args:
        first: int32 [batch], the key at which each sequence starts; None for the first one. With a batch of one,
            [num_seqs]: sequences that follow one another.
        most_keys: of a sequence; all keys by default. The block table has a column for each of their pages.
    """
    batch, _, num_keys, _ = key.shape
    if key.stride() != value.stride() or not all(map(_can_be_viewed, (key, value))):
        key, value = _with_room(key), _with_room(value)
    num_pages = min(_num_pages(key), _num_pages(value))
    starts = torch.arange(batch, dtype=torch.int32, device=key.device) * (key.stride(0) // key.stride(2))
    if first is not None:
        starts = starts + first
    pages = torch.arange(
        0, num_keys if most_keys is None else most_keys, PAGE_SIZE, dtype=torch.int32, device=key.device
    )
    return _viewed(key, num_pages), _viewed(value, num_pages), starts[:, None] + pages


def _can_be_viewed(tensor: Tensor) -> bool:
    batch, _, num_keys, head_dim = tensor.shape
    batch_stride, _, row_stride, _ = tensor.stride()
    if tensor.stride(3) != 1 or row_stride < head_dim or (batch > 1 and batch_stride % row_stride):
        return False
    reads_whole_pages = not replays(tensor.device) or bool(current_swaps())
    last_row = (batch - 1) * batch_stride // row_stride + num_keys - 1
    return _num_pages(tensor) >= (last_row + 1 if reads_whole_pages else 1)


def _num_pages(tensor: Tensor) -> int:
    """How many pages, each a row after the one before it, end within the tensor's memory; negative if rows are few."""
    _, num_kv_heads, _, head_dim = tensor.shape
    _, head_stride, row_stride, _ = tensor.stride()
    elements = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return (elements - (num_kv_heads - 1) * head_stride - head_dim) // row_stride - PAGE_SIZE + 2


def _viewed(tensor: Tensor, num_pages: int) -> Tensor:
    """[num_pages, PAGE_SIZE, num_kv_heads, head_dim]."""
    _, num_kv_heads, _, head_dim = tensor.shape
    _, head_stride, row_stride, _ = tensor.stride()
    return tensor.as_strided((num_pages, PAGE_SIZE, num_kv_heads, head_dim), (row_stride, row_stride, head_stride, 1))


def _with_room(tensor: Tensor) -> Tensor:
    """A copy, [batch, num_kv_heads, num_keys, head_dim], with a page of memory after each head's last row."""
    batch, num_kv_heads, num_keys, head_dim = tensor.shape
    copy = tensor.new_empty(batch, num_kv_heads, num_keys + PAGE_SIZE, head_dim)[:, :, :num_keys]
    return copy.copy_(tensor)


def _gathered(key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The visible keys, [batch, num_keys] bool, moved to the front: (key, value, ``seen`` as int32)."""
    order = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, None, :, None]
    count = visible.sum(1, dtype=torch.int32)
    key, value = (tensor.gather(2, order.expand_as(tensor)) for tensor in (key, value))
    return key, value, torch.stack([torch.zeros_like(count), count]).t()[:, None, None]
