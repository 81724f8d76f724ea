"""Variants of a decode step, timed in one process.

    python benchmarks/decode_variants.py Llama-3-8B:Q4_K_M 64,16384 base/attention_splits:MIN_SPLIT=128,MAX_SPLITS=16
    python benchmarks/decode_variants.py Llama-3-8B:Q4_K_M 1024 base --sequences 1,8,64

Lengths are tokens in the cache of each sequence. Variants are separated by slashes. Each is ``base``, which changes
nothing, or settings joined by ``+``: a kernel of the launch table with a configuration for all its calls. ``--profile``
prints where each step spends its time: for each kernel and grid, from the end of the launch before to its own end, so
that kernels that overlap are not counted twice. ``--warm`` only compiles, with two layers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

import step
from rooflama.kernels.launch import override
from rooflama.models import DecodeSlots, ModelRunner

REPLAYS = 48
SPARE_TOKENS = 256  # that the steps of a variant append
SHOWN = 14


def seconds_per_step(slots: DecodeSlots) -> float:
    """The better of two runs of REPLAYS steps."""
    found = []
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(REPLAYS):
            slots.step()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - started) / REPLAYS)
    return min(found)


def profile(slots: DecodeSlots) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            slots.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    launches = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"][:36], tuple(event["args"].get("grid", ())))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")
    )
    count = len(launches) // 3
    middle = launches[count - 1 : 2 * count]
    spent = defaultdict(list)
    for (_, before, _, _), (_, end, name, grid) in itertools.pairwise(middle):
        spent[name, grid].append(end - before)
    print(f"{count} launches, {middle[-1][1] - middle[0][1]:.0f} us; us each, launches, us in all")
    for (name, grid), times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        print(f"  {name:36} {grid!s:16} {sum(times) / len(times):7.2f} {len(times):4} {sum(times):8.1f}")


@contextlib.contextmanager
def chosen(variant: str):
    """The settings of a variant, inside the ``with`` block."""
    with contextlib.ExitStack() as stack:
        for setting in variant.split("+"):
            name, _, values = setting.partition(":")
            if name != "base":
                numbers = (pair.split("=") for pair in values.split(","))
                stack.enter_context(override(name, **{key: int(value) for key, value in numbers}))
        yield


def run(runner: ModelRunner, sequences: int, length: int, *, only_compile: bool, profiled: bool) -> float:
    """Seconds per step, NaN for ``only_compile``."""
    slots = step.captured(runner, sequences, length)
    seconds = float("nan") if only_compile else seconds_per_step(slots)
    if profiled:
        profile(slots)
    for sequence in slots.sequences:
        runner.cache.free(sequence.cache_id)
    return seconds


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("lengths", type=numbers)
    parser.add_argument("variants", type=lambda text: text.split("/"))
    parser.add_argument("--sequences", type=numbers, default=[1])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args()
    if options.warm:
        whole = step.config_of
        step.config_of = lambda name: dataclasses.replace(whole(name), num_layers=2, sliding_windows=(0, 0))
    model, types = options.model.split(":")
    case = step.Case(model, types, max(options.sequences), max(options.lengths))
    batches = list(itertools.product(options.sequences, options.lengths))
    with step.random_runner(case, SPARE_TOKENS) as (runner, _, _):
        for variant in options.variants:
            with chosen(variant):
                for sequences, length in batches[:1] if options.warm else batches:
                    seconds = run(runner, sequences, length, only_compile=options.warm, profiled=options.profile)
                    rate = f"{sequences / seconds:,.1f} tokens/s"
                    print(f"{options.model} {sequences} x {length}, {variant}: {rate}", flush=True)


if __name__ == "__main__":
    main()
