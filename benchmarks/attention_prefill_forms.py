"""Prefill attention in the forms that its launch table can choose: python benchmarks/attention_prefill_forms.py

TFLOP/s, causal, bf16, one sequence: the median of ROUNDS medians of replayed graphs. Every round times every form, so
that a chip that becomes warm, or was idle before, tells on all alike. Forms are compiled beforehand, side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from triton.backends.compiler import GPUTarget

from rooflama.kernels import attention_prefill
from rooflama.kernels.launch import override
from rooflama.kernels.rehearsal import compile_launches, rehearsal, without_gpu
from timing import measure

ROUNDS = 5
HEADS = {128: (32, 8), 96: (32, 32), 64: (32, 8)}
PLAIN = {"STAGES": 0}
TWO = {
    "plain": PLAIN,
    "2 consumers": {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 2},
}
FORMS = {
    128: TWO,
    96: TWO,
    64: TWO
    | {
        "3 consumers": {"BLOCK_N": 128, "STAGES": 3, "CONSUMERS": 3},
        "3 consumers, 2 stages": {"BLOCK_N": 128, "STAGES": 2, "CONSUMERS": 3},
        "3 consumers, tiles of 64": {"BLOCK_N": 64, "STAGES": 3, "CONSUMERS": 3},
    },
}


def calls_of(head_dim: int, tokens: int, page_size: int, device: str) -> list[Callable[[], tuple]]:
    """Four calls on two sets of buffers."""
    heads, kv_heads = HEADS[head_dim]
    shape = (tokens // page_size, page_size, kv_heads, head_dim)
    pools = [tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)) for _ in range(2)]
    table = torch.randperm(shape[0], device=device).to(torch.int32).view(1, -1)
    lens, starts = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([tokens], [0, tokens]))
    q = torch.randn(tokens, heads, head_dim, device=device, dtype=torch.bfloat16)
    return [
        lambda pool=pool: attention_prefill(q, *pool, table, lens, starts, softmax_scale=head_dim**-0.5)
        for pool in pools * 2
    ]


def compile_form(head_dim: int, page_size: int, configuration: dict[str, int]) -> None:
    gpu = GPUTarget("cuda", 90, 32)
    with rehearsal(gpu) as found, override("attention_prefill_hopper", **configuration):
        calls_of(head_dim, 4096, page_size, "meta")[0]()
    with without_gpu(gpu):
        compile_launches(found.launches, None)


def compile_all(head_dims: list[int], page_sizes: list[int]) -> None:
    with ProcessPoolExecutor(
        min(16, len(os.sched_getaffinity(0))), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for job in [
            pool.submit(compile_form, head_dim, page_size, configuration)
            for head_dim in head_dims
            for page_size in page_sizes
            for configuration in FORMS[head_dim].values()
        ]:
            job.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    compile_all(options.head_dims, options.page_sizes)
    print(torch.cuda.get_device_name(), flush=True)
    for head_dim in options.head_dims:
        heads, forms = HEADS[head_dim][0], FORMS[head_dim]
        for page_size in options.page_sizes:
            for tokens in (4096, 16384):
                print(f"head_dim {head_dim}, {tokens:,} tokens, pages of {page_size}:")
                calls, rates = calls_of(head_dim, tokens, page_size, "cuda"), {name: [] for name in forms}
                with override("attention_prefill_hopper", **PLAIN):
                    expected = calls[0]()
                for _ in range(options.rounds):
                    for name, configuration in forms.items():
                        with override("attention_prefill_hopper", **configuration):
                            time = measure(calls, replays=9).p50
                        rates[name].append(2 * tokens**2 * heads * head_dim / time / 1e6)
                for name, configuration in forms.items():
                    with override("attention_prefill_hopper", **configuration):
                        found = calls[0]()
                    off = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
                    print(f"    {statistics.median(rates[name]):4.0f} {name} (differs by {off:.1e})", flush=True)


if __name__ == "__main__":
    main()
