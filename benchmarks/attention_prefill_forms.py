"""Prefill attention in the forms that its launch table can choose: python benchmarks/attention_prefill_forms.py

TFLOP/s, causal, bf16, one sequence: the median of ROUNDS medians of replayed graphs. Every round times every form, so
that a chip that becomes warm, or was idle before, tells on all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from rooflama.kernels import attention_prefill
from rooflama.kernels.launch import override
from timing import measure

ROUNDS = 5
HEADS = {128: (32, 8), 96: (32, 32), 64: (32, 8)}
FORMS = {
    "plain": {"STAGES": 0},
    "2 consumers": {"BLOCK_N": 128, "STAGES": 3, "CONSUMERS": 2},
    "2 consumers, 2 stages": {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 2},
    "3 consumers": {"BLOCK_N": 128, "STAGES": 3, "CONSUMERS": 3},
}


def calls_of(head_dim: int, tokens: int, page_size: int) -> list[Callable[[], object]]:
    """Four calls on two sets of buffers."""
    heads, kv_heads = HEADS[head_dim]
    shape = (tokens // page_size, page_size, kv_heads, head_dim)
    pools = [tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(2)]
    table = torch.randperm(shape[0], device="cuda").to(torch.int32).view(1, -1)
    lens, starts = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([tokens], [0, tokens]))
    q = torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    return [
        lambda pool=pool: attention_prefill(q, *pool, table, lens, starts, softmax_scale=head_dim**-0.5)
        for pool in pools * 2
    ]


def main() -> None:
    print(torch.cuda.get_device_name())
    for head_dim, (heads, _) in HEADS.items():
        forms = {name: form for name, form in FORMS.items() if head_dim == 64 or form.get("CONSUMERS") != 3}
        for tokens, page_size in ((4096, 64), (16384, 64), (4096, 16), (16384, 16)):
            calls, rates = calls_of(head_dim, tokens, page_size), {name: [] for name in forms}
            for _ in range(ROUNDS):
                for name, form in forms.items():
                    with override("attention_prefill_hopper", **form):
                        time = measure(calls, replays=9).p50
                    rates[name].append(2 * tokens**2 * heads * head_dim / time / 1e6)
            medians = "  ".join(f"{name} {statistics.median(found):.0f}" for name, found in rates.items())
            print(f"head_dim {head_dim}, {tokens:,} tokens, pages of {page_size}: {medians}", flush=True)


if __name__ == "__main__":
    main()
