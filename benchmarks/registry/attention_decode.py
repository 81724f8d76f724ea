"""Decode attention: one token per sequence over pages of 16 and of 64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import cases
from cases import BF16, Case, paged
from model_calls import Call, Model, attentions
from rooflama import kernels


def measured() -> Iterator[Case]:
    """One token over pages of 16; the peer is torch SDPA over contiguous keys and values. Then pages of 64 alone.

    Programs count themselves in zeros that all calls share, as the calls of a decode step do.
    """
    batches = [(1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (32, 4096), (64, 8192)]
    for heads, kv_heads, head_dim in ((32, 8, 128), (28, 4, 128), (32, 32, 96)):
        for num_seqs, context in batches:
            if num_seqs * context * kv_heads * head_dim * 4 > 20e9:
                continue
            pools, block_table, seq_lens = paged(num_seqs, context, kv_heads, head_dim, 16)
            q = torch.randn(num_seqs, heads, head_dim, device=cases.CUDA, dtype=BF16)
            scale = head_dim**-0.5
            dense = [
                tuple(p.view(num_seqs, context, kv_heads, head_dim).transpose(1, 2) for p in pool) for pool in pools
            ]

            arrivals = torch.zeros(num_seqs, heads, device=cases.CUDA, dtype=torch.int32)

            def ours(pool, q=q, table=block_table, lens=seq_lens, arrivals=arrivals, scale=scale):
                return kernels.attention_decode(q, *pool, table, lens, arrivals=arrivals, softmax_scale=scale)

            def sdpa(pool, q=q.unsqueeze(2)):
                return F.scaled_dot_product_attention(q, *pool, enable_gqa=True)

            label = f"{heads}/{kv_heads} d{head_dim} {num_seqs}x{context}"
            work = 4 * num_seqs * context * kv_heads * head_dim, 4 * num_seqs * context * heads * head_dim
            facts = {"itemsize": 2, "head_dim": head_dim}
            implementations = {
                "rooflama": [lambda p=p, f=ours: f(p) for p in pools],
                "torch SDPA": [lambda p=p, f=sdpa: f(p) for p in dense],
            }
            yield Case(label, *work, implementations, facts)
            if kv_heads == 8:
                pools, block_table, seq_lens = paged(num_seqs, context, kv_heads, head_dim, 64)
                calls = [lambda p=p, f=ours, table=block_table: f(p, table=table) for p in pools]
                yield Case(f"{label}, pages of 64", *work, {"rooflama": calls}, facts)


def calls(model: Model, everything: bool) -> Iterator[Call]:
    for note, q, kv, table, lens, _, options in attentions(model, everything):
        yield Call(kernels.attention_decode, note, (q.narrow(0, 0, len(lens)), *kv, table, lens), options)
