"""``rooflama.attention``: the attention kernels on dense tensors, without pages of the caller's."""

from __future__ import annotations

import torch
from torch import Tensor

from rooflama.models import ArgumentError

from .integrations.dense import dense_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of dense queries to dense keys and values, by the paged kernels.

    K and V are read in place, as pages that begin at any row, where both have the same strides and their rows lie at
    equal distances. Otherwise, and on the CPU where fewer than 128 rows lie behind the last key, they are copied once.
    Queries are copied unless they lie token by token, [..., num_queries, num_heads, head_dim] in memory.

    Args:
        q: [..., num_heads, num_queries, head_dim], float32, float16 or bfloat16, any number of leading dimensions;
            head_dim to 256. Query head h reads K/V head h // (num_heads / num_kv_heads).
        k, v: [..., num_kv_heads, num_keys, head_dim], the same leading dimensions and the dtype of q.
        causal: the queries are the last tokens: query i of Q sees the keys j <= num_keys - Q + i. If False, every query
            sees every key, and K/V are read once per query, as in decoding: slow for many queries.
        softmax_scale: multiplies every score; 1 / sqrt(head_dim) by default.
        sliding_window: how many keys a query sees, its own included; 0 for all. Needs ``causal``.
        softcap: a score becomes softcap * tanh(score / softcap); 0 for none.

    Returns:
        [..., num_heads, num_queries, head_dim], dtype of q; in memory token by token. A query without a key gives 0.

    Raises:
        ArgumentError: no tensors, leading dimensions that differ, or a window without ``causal``.
        KernelInputError: shapes, dtypes, devices or numbers do not fit, or a tensor requires grad.
    """
    for name, given in (("q", q), ("k", k), ("v", v)):
        if not isinstance(given, Tensor):
            raise ArgumentError(
                f"{name} is a {type(given).__name__}", rule="q, k and v are tensors", remedy="Give torch tensors"
            )
    leading = q.shape[:-3]
    if q.ndim < 3 or k.shape[:-3] != leading or v.shape != k.shape or k.ndim != q.ndim or k.shape[-1] != q.shape[-1]:
        raise ArgumentError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}",
            rule="q is [..., num_heads, num_queries, head_dim], k and v are [..., num_kv_heads, num_keys, head_dim]",
            remedy="Give them the same leading dimensions and head_dim",
        )
    if sliding_window and not causal:
        raise ArgumentError(
            f"sliding_window {sliding_window} without causal",
            rule="a window ends at the query's own key",
            remedy="Leave one of the two out",
        )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    queries, keys, values = (x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    if causal or q.shape[-2] == 1:
        out = dense_attention(
            queries, keys, values, softmax_scale=scale, sliding_window=sliding_window, softcap=softcap
        )
    else:
        rows = [
            dense_attention(
                one.transpose(0, 1).unsqueeze(2), *(x.expand(q.shape[-2], -1, -1, -1) for x in (key, value)),
                softmax_scale=scale, softcap=softcap,
            ).squeeze(1)
            for one, key, value in zip(queries, keys, values, strict=True)
        ]  # fmt: skip
        out = torch.stack(rows) if rows else torch.empty_like(queries.transpose(1, 2))
    return out.transpose(1, 2).reshape(q.shape) if q.ndim != 4 else out.transpose(1, 2)
