"""Rotation, alone and with the cache write, of 32 query and 8 key heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import cases
from cases import Case, heads_and_slots, page_pools
from model_calls import BATCHES, CONTEXT, F32, INT32, INT64, Call, Model, empty, page_dtypes, pages, short
from rooflama import kernels


def measured() -> Iterator[Case]:
    pools = page_pools()
    slots_in_pools = pools[0].shape[0] * pools[0].shape[1]
    cos, sin = (torch.randn(slots_in_pools, 64, device=cases.CUDA) for _ in range(2))
    for tokens in (1, 4096):
        sets = heads_and_slots(tokens, slots_in_pools)
        positions = torch.arange(tokens, device=cases.CUDA, dtype=torch.int32)

        def rope(q, positions=positions):
            return kernels.rope(q, cos, sin, positions)

        def fused(q, k, v, slots, positions=positions):
            return kernels.rope_and_cache_write(q, k, v, cos, sin, positions, slots, *pools)

        q, k, v, _ = sets[0]
        yield Case(
            f"rope tokens={tokens}", 2 * q.nbytes, 0,
            {"rooflama": [lambda q=q, f=rope: f(q) for q, *_ in sets]},
        )  # fmt: skip
        yield Case(
            f"rope_and_cache_write tokens={tokens}", 2 * (q.nbytes + k.nbytes + v.nbytes), 0,
            {"rooflama": [lambda s=s, f=fused: f(*s) for s in sets]},
        )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    half = (model.rotary_dim or model.head_dim) // 2
    cos, sin = empty(CONTEXT, half, dtype=F32), empty(CONTEXT, half, dtype=F32)
    norms: dict[str, Any] = {}
    if model.qk_norm:
        norms = {"q_norm": empty(model.head_dim, dtype=F32), "k_norm": empty(model.head_dim, dtype=F32), "eps": 1e-6}
    for tokens in BATCHES:
        qkv = empty(tokens, model.num_heads + 2 * model.num_kv_heads, model.head_dim)
        q, k, v = qkv.split([model.num_heads, model.num_kv_heads, model.num_kv_heads], dim=1)
        positions, slots = empty(tokens, dtype=INT32), empty(tokens, dtype=INT64)
        yield Call(kernels.rope, f"{tokens} tokens", (q, cos, sin, positions))
        if everything:
            yield Call(kernels.rope, f"{tokens} tokens interleaved", (q, cos, sin, positions), {"interleaved": True})
        for dtype in page_dtypes(everything):
            kv, scales = pages(model, dtype)
            yield Call(
                kernels.rope_and_cache_write,
                f"{tokens} tokens {short(dtype)} pages",
                (q, k, v, cos, sin, positions, slots, *kv),
                {**norms, **scales},
            )
