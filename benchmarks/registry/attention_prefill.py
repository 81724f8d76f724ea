"""Prefill attention: a whole prompt over pages of 64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import cases
from cases import BF16, Case, paged
from model_calls import Call, Model, attentions
from rooflama import kernels


def measured() -> Iterator[Case]:
    """A whole prompt over pages of 64; the peer is torch SDPA, by whichever of its kernels torch picks."""
    for heads, kv_heads, head_dim in ((32, 8, 128), (32, 8, 64), (32, 32, 96)):
        for tokens in (1024, 4096, 16384):
            pools, block_table, seq_lens = paged(1, tokens, kv_heads, head_dim, 64)
            starts = torch.tensor([0, tokens], device=cases.CUDA, dtype=torch.int32)
            q = torch.randn(tokens, heads, head_dim, device=cases.CUDA, dtype=BF16)
            dense = [
                tuple(
                    p[block_table[0].long()].view(1, tokens, kv_heads, head_dim).transpose(1, 2).contiguous()
                    for p in pool
                )
                for pool in pools
            ]

            def ours(pool, q=q, table=block_table, lens=seq_lens, starts=starts, scale=head_dim**-0.5):
                return kernels.attention_prefill(q, *pool, table, lens, starts, softmax_scale=scale)

            def sdpa(pool, q=q.transpose(0, 1).unsqueeze(0).contiguous()):
                return F.scaled_dot_product_attention(q, *pool, is_causal=True, enable_gqa=True)

            yield Case(
                f"{heads}/{kv_heads} d{head_dim} n={tokens}",
                4 * tokens * (heads + kv_heads) * head_dim,
                2 * tokens * tokens * heads * head_dim,
                {
                    "rooflama": [lambda p=p, f=ours: f(p) for p in pools],
                    "torch SDPA": [lambda p=p, f=sdpa: f(p) for p in dense],
                },
                {"itemsize": 2, "head_dim": head_dim},
            )


def calls(model: Model, everything: bool) -> Iterator[Call]:
    for note, q, kv, table, lens, starts, options in attentions(model, everything):
        yield Call(kernels.attention_prefill, note, (q, *kv, table, lens, starts), options)
