"""Writing tokens into pages, gathering and copying pages, of 8 heads of 128."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import cases
from cases import Case, heads_and_slots, page_pools, paged
from model_calls import CHUNK, CONTEXT, INT32, INT64, PAGE_SIZE, Call, Model, empty, page_dtypes, pages, short
from rooflama import kernels


def measured() -> Iterator[Case]:
    pools = page_pools()
    for tokens in (1, 4096):
        sets = heads_and_slots(tokens, pools[0].shape[0] * pools[0].shape[1])
        _, k, v, _ = sets[0]
        yield Case(
            f"write_kv tokens={tokens}", 2 * (k.nbytes + v.nbytes), 0,
            {"rooflama": [lambda s=s: kernels.write_kv(s[1], s[2], *pools, s[3]) for s in sets]},
        )  # fmt: skip
    filled, block_table, seq_lens = paged(8, 4096, 8, 128, 16)
    num_keys = 8 * 4096
    yield Case(
        "gather_kv 8x4096", 4 * num_keys * 8 * 128, 0,
        {
            "rooflama": [
                lambda p=pool[0]: kernels.gather_kv(p, block_table, seq_lens, num_keys=num_keys) for pool in filled
            ]
        },
    )  # fmt: skip

    sources = [torch.randperm(pools[0].shape[0], device=cases.CUDA)[:512].chunk(2) for _ in range(8)]
    yield Case(
        "copy_pages 256 of 16", 2 * 256 * pools[0][0].nbytes, 0,
        {"rooflama": [lambda p=pool, s=s: kernels.copy_pages(p, *s) for s in sources for pool in pools]},
    )  # fmt: skip


def calls(model: Model, everything: bool) -> Iterator[Call]:
    k, v = (empty(8, model.num_kv_heads, model.head_dim) for _ in range(2))
    for dtype in page_dtypes(everything):
        (k_pages, v_pages), scales = pages(model, dtype)
        yield Call(kernels.write_kv, f"{short(dtype)} pages", (k, v, k_pages, v_pages, empty(8, dtype=INT64)), scales)
        yield Call(kernels.copy_pages, f"{short(dtype)} pages", (k_pages, empty(4, dtype=INT64), empty(4, dtype=INT64)))
        table, lens = empty(4, CONTEXT // PAGE_SIZE, dtype=INT32), empty(4, dtype=INT32)
        keys = (k_pages, table, lens, scales.get("k_scale"))
        yield Call(kernels.gather_kv, f"{short(dtype)} pages", keys, {"num_keys": 4 * CHUNK})
