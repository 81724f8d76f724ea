"""Host time of one eager call, and of a short prompt: ``python benchmarks/overhead.py [--out FILE.csv]``.

A kernel's row is the time until a call returns, without waiting for the device. Its shapes are small, so that the queue
does not fill. A prompt's row has the elapsed time and the sum of its kernels' times, from a profile. If the elapsed
time is longer, the host is the limit.

Without a GPU, the same calls are bound to launches that do nothing. The result is then what this package adds to
Triton's launcher.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cases import random_weight
from rooflama import kernels
from timing import provenance, write_rows

CALLS = 200
PROMPTS = [("Llama-3-8B", types, tokens) for types in ("Q4_K_M", "BF16") for tokens in (64, 256, 512, 1024)]


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """Eager calls in the shapes of Llama-3-8B, one token."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    make = partial(torch.ones, device=device, dtype=dtype)
    x, gate, up, residual = make(1, 4096), make(1, 14336), make(1, 14336), make(1, 4096)
    norm, q, k, v = torch.ones(4096, device=device), make(1, 32, 128), make(1, 8, 128), make(1, 8, 128)
    weight = random_weight("Q4_K", 4096, 4096)
    k_pages, v_pages = make(40, 64, 8, 128), make(40, 64, 8, 128)
    cos, sin = torch.ones(64, 64, device=device), torch.ones(64, 64, device=device)
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    table = torch.arange(32, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([2000], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return {
        "torch.add": lambda: torch.add(x, residual),
        "rms_norm": lambda: kernels.rms_norm(x, norm, 1e-5),
        "swiglu": lambda: kernels.swiglu(gate, up),
        "quantized_matmul": lambda: kernels.quantized_matmul(
            x, weight, norm_weight=norm, eps=1e-5, residual=residual, resident=True
        ),
        "rope_and_cache_write": lambda: kernels.rope_and_cache_write(
            q, k, v, cos, sin, positions, slots, k_pages, v_pages
        ),
        "attention_decode": lambda: kernels.attention_decode(
            q, k_pages, v_pages, table, lengths, softmax_scale=0.09
        ),
        "attention_prefill": lambda: kernels.attention_prefill(
            q, k_pages, v_pages, table, lengths, starts, softmax_scale=0.09
        ),
    }  # fmt: skip


def host_microseconds(call: Callable[[], Any]) -> float:
    """The median over repetitions of a call's time until it returns; without a GPU, of the process's own time."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(9):
        started = clock()
        for _ in range(CALLS):
            call()
        times.append((clock() - started) / CALLS * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(times[2:])


def without_a_gpu(stack: ExitStack) -> None:
    """Let CPU tensors go the way of a GPU's: bound once, then replayed, with launches that do nothing."""

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: None

    def no(*tensors: torch.Tensor, **options: bool) -> bool:
        return False

    def yes(device: torch.device) -> bool:
        return True

    stack.enter_context(mock.patch("cases.CUDA", "cpu"))
    stack.enter_context(mock.patch("rooflama.kernels.kernel.run", return_value=Compiled()))
    stack.enter_context(mock.patch("rooflama.kernels.kernel.replays", yes))
    stack.enter_context(mock.patch("rooflama.kernels.kernel.runs_numpy", no))


def prompt_milliseconds(model: str, types: str, tokens: int) -> tuple[float, float]:
    """(by the clock, on the device) for one prompt of a model with random weights; medians."""
    from step import Case, random_runner

    with random_runner(Case(model, types, 1, 0), tokens + 64) as (runner, _, _):

        def prefill() -> None:
            sequence = runner.cache.add()
            for _, hidden in runner.prefill([sequence], [list(range(tokens))], [tokens]):
                runner.decoder.logits(hidden[-1:])
            runner.cache.free(sequence)

        clock = []
        for _ in range(7):
            torch.cuda.synchronize()
            started = time.perf_counter()
            prefill()
            torch.cuda.synchronize()
            clock.append((time.perf_counter() - started) * 1e3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            prefill()
            torch.cuda.synchronize()
        device = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3
        return statistics.median(clock[2:]), device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    parser.add_argument("--no-prompts", action="store_true", help="kernels only")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        if not on_gpu:
            without_a_gpu(stack)
        stack.enter_context(torch.inference_mode())
        for name, call in calls("cuda" if on_gpu else "cpu").items():
            microseconds = host_microseconds(call)
            print(f"{name:22} {microseconds:7.1f} us", flush=True)
            rows.append({"call": name, "host": f"{microseconds:.1f} us", "device": ""})
    if on_gpu and not options.no_prompts:
        for model, types, tokens in PROMPTS:
            clock, device = prompt_milliseconds(model, types, tokens)
            name = f"prompt of {tokens} tokens, {model} {types}"
            print(f"{name:42} {clock:7.1f} ms by the clock, {device:7.1f} ms on the device", flush=True)
            rows.append({"call": name, "host": f"{clock:.1f} ms", "device": f"{device:.1f} ms"})
    if options.out:
        where = provenance() if on_gpu else {"gpu": "none: launches that do nothing"}
        write_rows(options.out, [row | where for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
