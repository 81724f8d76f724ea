"""The functions of the flash-attn package that decoders call, on our attention kernels.

Names, shapes and keywords are those of flash-attn 2, which inference libraries share; options are keywords only.
Attention is causal: query i of Q is at position num_keys - Q + i. One query per sequence need not say so. Nothing is
random, so ``deterministic`` changes nothing. What is not served is refused.

``rooflama.integrations.transformers.register_flash`` gives these functions to continuous batching.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflama.kernels import attention_prefill, write_kv
from rooflama.models import ArgumentError

from .dense import as_pages, attend_pages, dense_attention


@torch.compiler.disable
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
    **unserved: Any,
) -> Tensor:
    """Attention of equally long sequences.

    Args:
        q: [batch, num_queries, num_heads, head_dim].
        k, v: [batch, num_keys, num_kv_heads, head_dim].
        softmax_scale: multiplies every score; 1 / sqrt(head_dim) by default.
        window_size: (left, right): how many keys before its own a query sees, -1 for all; right has no effect.
        softcap: a score becomes softcap * tanh(score / softcap); 0 for none.

    Returns:
        [batch, num_queries, num_heads, head_dim].

    Raises:
        ArgumentError: an option that is not served, such as dropout.
        KernelInputError: shapes, dtypes, devices or numbers do not fit, or a tensor requires grad.
    """
    _refuse(causal or q.shape[1] == 1, dropout_p=dropout_p, s_aux=s_aux, **unserved)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return dense_attention(*heads, **_options(q, softmax_scale, window_size, softcap))


@torch.compiler.disable
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    **unserved: Any,
) -> Tensor:
    """Attention of sequences that follow one another without padding.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k, v: [num_keys, num_kv_heads, head_dim], or pages [num_pages, page_size, num_kv_heads, head_dim] with a table.
        cu_seqlens_q: int32 [num_seqs + 1]; sequence i owns the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1.
        cu_seqlens_k: int32 [num_seqs + 1], the same for keys; with a table only their differences count.
        max_seqlen_q, max_seqlen_k: at least the most queries and keys of a sequence.
        block_table: int32 [num_seqs, max_pages_per_seq].

    The other arguments, and what is raised, are those of ``flash_attn_func``.

    Returns:
        [num_tokens, num_heads, head_dim]. Tokens past cu_seqlens_q[-1] get 0.
    """
    _refuse(causal or max_seqlen_q == 1, dropout_p=dropout_p, s_aux=s_aux, **unserved)
    seq_lens = cu_seqlens_k.diff()
    if block_table is None:
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        k, v, block_table = as_pages(k, v, cu_seqlens_k[:-1], most_keys=int(max_seqlen_k))
    options = _options(q, softmax_scale, window_size, softcap)
    out, _ = attention_prefill(q, k, v, block_table, seq_lens, cu_seqlens_q, **options)
    return out


@torch.compiler.disable
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    **unserved: Any,
) -> Tensor:
    """Write new keys behind those of a cache, in place, then attend to all of them.

    Args:
        q: [batch, num_queries, num_heads, head_dim], the last tokens of each sequence.
        k_cache, v_cache: [batch, most_keys, num_kv_heads, head_dim], or pages [num_pages, page_size, num_kv_heads,
            head_dim] with a table.
        k, v: [batch, num_new, num_kv_heads, head_dim], or None if the cache has them already.
        cache_seqlens: int32 [batch], or one number for all: keys in the cache, without the new ones. By default all.
            A sequence of -1 keys and one new one is padding: nothing is written for it, and its result is 0.
        block_table: int32 [batch, max_pages_per_seq].

    The other arguments, and what is raised, are those of ``flash_attn_func``.

    Returns:
        [batch, num_queries, num_heads, head_dim].
    """
    _refuse(causal or q.shape[1] == 1, s_aux=s_aux, **unserved)
    batch = q.shape[0]
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ArgumentError(
                "no cache_seqlens",
                rule="without new keys and without a block table alone, all keys of the cache are meant",
                remedy="Pass the number of keys that each sequence has",
            )
        cache_seqlens = k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    seq_lens = cache_seqlens.int()
    if k is not None and v is not None:
        _write(k, v, k_cache, v_cache, seq_lens, block_table)
        seq_lens = seq_lens + k.shape[1]
    if block_table is None:
        k_cache, v_cache, block_table = as_pages(k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    options = _options(q, softmax_scale, window_size, softcap)
    return attend_pages(q, k_cache, v_cache, block_table, seq_lens, **options)


def _write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None
) -> None:
    positions = seq_lens[:, None].long() + torch.arange(k.shape[1], device=k.device)
    if block_table is None:
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        k_cache[rows, positions], v_cache[rows, positions] = k, v
        return
    page_size = k_cache.shape[1]
    pages = block_table.long().gather(1, positions.clamp(min=0) // page_size)
    slots = torch.where(positions < 0, -1, pages * page_size + positions % page_size)
    write_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())


def _options(q: Tensor, softmax_scale: float | None, window_size: tuple[int, int], softcap: float) -> dict[str, Any]:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return {"softmax_scale": scale, "sliding_window": max(0, window_size[0] + 1), "softcap": softcap}


def _refuse(causal: bool, **unserved: Any) -> None:
    """Every option in ``unserved`` must say nothing: None, False or 0."""
    if not causal:
        unserved = {**unserved, "causal": "False for several queries"}
    for name, value in unserved.items():
        if isinstance(value, Tensor) or value not in (None, False, 0):
            raise ArgumentError(
                f"{name}={value if isinstance(value, str | int | float) else type(value).__name__}",
                rule="these kernels attend causally, without dropout, biases, sinks or rotation",
                remedy=f"Leave {name} out, or use flash-attn",
            )
