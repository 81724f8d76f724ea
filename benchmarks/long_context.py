"""131,072 tokens of one sequence: ``python benchmarks/long_context.py [--out FILE.csv] [--only REGEX]``.

Each case is a type of weights, random and of Llama-3-8B's shape, and a type of pages. It runs in a process of its own.
The prompt passes through the model in chunks, as it does in use. Then decode steps of one sequence are timed at several
depths of the same pages. The host waits for each chunk, and for STEPS steps together, which replay a CUDA graph.

A row has the milliseconds of one chunk, or of one decode step (``what``: chunk or token); ``depth`` is the number of
tokens in the cache after it. ``of_roofline`` is the least time divided by the measured time. The least time of a chunk
is the operations of its products and of causal attention at the matrix rate; the logits are not part of a chunk. That
of a token is its weights, keys and values at the memory rate. Each row also has the memory of its process against the
plan, in the terms of ``memory_plan_check.py``. Exit status 1 if it is off by more than 2%.

``--small`` runs a tiny model over a short prompt, also on a CPU, to see that everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import memory_plan_check
from memory_plan_check import RandomSource, ShapesOnly, as_row, compared, config_of, driver_used, gpu_id, within
from rooflama.loaders.device import open_device
from rooflama.loading import start_runner
from rooflama.models import (
    CheckpointReader,
    Decoder,
    DecodeSlots,
    MemoryPlan,
    ModelConfig,
    ModelRunner,
    Request,
    SamplingParams,
    Sequence,
    adapter_for,
)
from rooflama.models.memory.terms import kv_token_bytes
from rooflama.models.serving.passes import captured_sizes
from rooflama.planning import PREFILL_CHUNK, plan_for_device
from step import WARM_UP, types_of
from step import Case as StepCase
from timing import ceilings, provenance, write_rows


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens."""

    model: str = "Llama-3-8B"
    tokens: int = 131072
    depths: tuple[int, ...] = (1024, 8192, 32768, 65536, 131072)
    chunk: int = PREFILL_CHUNK
    steps: int = 32


SMALL = Sizes("tiny", tokens=256, depths=(32, 256), chunk=64, steps=2)
CASES = [(types, pages) for types in ("Q4_K_M", "BF16") for pages in ("bfloat16", "int8")]
SMALL_CASES = [("Q4_K_M", "int8")]


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prefill_ms(runner: ModelRunner, num_tokens: int) -> tuple[int, list[float]]:
    """The id of a new sequence of random tokens in the cache, and the milliseconds of each of its chunks."""
    prompt = np.random.default_rng(0).integers(0, runner.decoder.config.vocab_size, num_tokens).tolist()
    cache_id, times = runner.cache.add(), []
    for start in range(0, num_tokens, runner.prefill_chunk):
        started = now()
        passes = runner.prefill([cache_id], [prompt[start : start + runner.prefill_chunk]], [runner.max_context])
        deque(passes, maxlen=0)  # runs them, and keeps no result
        times.append(1e3 * (now() - started))
    return cache_id, times


def token_ms(runner: ModelRunner, cache_id: int, sizes: Sizes) -> Iterator[float]:
    """Milliseconds of a decode step at each depth of ``sizes``: the mean of the steps that reach it."""
    slots = DecodeSlots(runner, 1, swaps={})
    sequence = Sequence(Request([0], None, SamplingParams()), cache_id=cache_id, num_cached=sizes.tokens)
    slots.join(sequence, limit=runner.max_context)
    for depth in sizes.depths:
        slots.lengths.fill_(depth - sizes.steps)
        for _ in range(WARM_UP):
            slots.step()
        slots.lengths.fill_(depth - sizes.steps)
        started = now()
        for _ in range(sizes.steps):
            slots.step()
        yield 1e3 * (now() - started) / sizes.steps


@dataclass(frozen=True)
class Least:
    """The fewest milliseconds of a chunk and of a token, at what the GPU reaches.

    Attributes:
        memory_rate, matrix_rate: bytes and operations per second, of ``ceilings``.
        layer_weights: weights in the layers' matrices.
        step_bytes: of the weights that a decode step reads.
        token_bytes: of the keys and values of one token.
    """

    config: ModelConfig
    memory_rate: float
    matrix_rate: float
    layer_weights: int
    step_bytes: int
    token_bytes: int

    def chunk(self, depth: int, count: int) -> float:
        """For the ``count`` tokens up to ``depth``: two operations per weight, four per element of a key seen."""
        seen = count * (depth - count) + count * (count + 1) // 2
        per_key = 4 * self.config.num_heads * self.config.head_dim * self.config.num_layers
        return 1e3 * (2 * count * self.layer_weights + seen * per_key) / self.matrix_rate

    def token(self, depth: int) -> float:
        return 1e3 * (self.step_bytes + depth * self.token_bytes) / self.memory_rate


@contextmanager
def running(
    types: str, pages: str, sizes: Sizes, rates: tuple[float, float]
) -> Iterator[tuple[ModelRunner, MemoryPlan, Least]]:
    """A model with random weights, on the GPU if there is one."""
    config = dataclasses.replace(config_of(sizes.model), context_length=sizes.tokens)
    rule, name = types_of(StepCase(sizes.model, types, 1, 0)), "cuda" if torch.cuda.is_available() else "cpu"
    with mock.patch.object(memory_plan_check, "type_of", rule), open_device(name) as device:
        reader = CheckpointReader(ShapesOnly(config))
        plan = plan_for_device(reader, config, device, context=sizes.tokens, dtype="auto", kv_dtype=pages)
        plan = plan.but(prefill_chunk=sizes.chunk)
        decoder = Decoder.load(RandomSource(reader, device), config, adapter_for("llama"))
        infos = reader.checkpoint.tensors.values()
        layers = sum(math.prod(info.shape) for info in infos if info.name.startswith("blk.") and len(info.shape) == 2)
        read = sum(buffer.nbytes for buffer in device.held() if buffer.label != "token_embd.weight")
        with torch.inference_mode():
            runner = start_runner(decoder, plan, device)
            yield runner, plan, Least(config, *rates, layers, read, kv_token_bytes(config, plan.kv_dtype))


def run_case(types: str, pages: str, sizes: Sizes, rates: tuple[float, float], before: int) -> list[dict[str, Any]]:
    """The lines of one case. ``before``: bytes that the driver counted before this process."""
    on_gpu = torch.cuda.is_available()
    memory = {}
    with running(types, pages, sizes, rates) as (runner, plan, least):
        short = min(captured_sizes(plan.config)[-1], sizes.tokens // 2)
        for length in (short, short, 2 * sizes.chunk):  # compiles and captures a short pass, compiles whole chunks
            runner.cache.free(prefill_ms(runner, length)[0])
        cache_id, chunks = prefill_ms(runner, sizes.tokens)
        used = [driver_used(gpu_id()) - before] if on_gpu else []
        tokens = list(token_ms(runner, cache_id, sizes))
        if on_gpu:
            used.append(driver_used(gpu_id()) - before)
            figures = as_row(sizes.model, sizes.tokens, pages, compared(plan, used))
            memory = {name: value for name, value in figures.items() if name.endswith(("_mib", "_error"))}
    ends = [(number + 1) * sizes.chunk for number in range(len(chunks))]
    timed = [("chunk", end, ms, least.chunk(end, sizes.chunk)) for end, ms in zip(ends, chunks, strict=True)]
    timed += [("token", depth, ms, least.token(depth)) for depth, ms in zip(sizes.depths, tokens, strict=True)]
    case = {"model": sizes.model, "weights": types, "pages": pages}
    return [
        {**case, "what": what, "depth": depth, "ms": f"{ms:.3f}", "of_roofline": f"{fewest / ms:.3f}", **memory}
        for what, depth, ms, fewest in timed
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="cases whose weights and pages match, as Q4_K_M int8"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model and a short prompt")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        types, pages, *figures = options.case
        memory_rate, matrix_rate, before = map(float, figures)
        print(json.dumps(run_case(types, pages, Sizes(), (memory_rate, matrix_rate), int(before))))
        return 0
    if not options.small and not torch.cuda.is_available():
        sys.exit("measuring needs a CUDA GPU; --small runs anywhere")
    rates = (math.inf, math.inf) if options.small else ceilings()
    torch.cuda.empty_cache()
    sizes, rows, all_within = SMALL if options.small else Sizes(), [], True
    for types, pages in SMALL_CASES if options.small else CASES:
        if not re.search(options.only, f"{types} {pages}"):
            continue
        if options.small:
            lines = run_case(types, pages, sizes, rates, 0)
        else:
            command = [sys.executable, __file__, "--case", types, pages, *map(str, (*rates, driver_used(gpu_id())))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{types} {pages}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                all_within = False
                continue
            lines = json.loads(done.stdout.strip().splitlines()[-1])
            all_within &= within(lines[0])
        for line in lines:
            print(" ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        rows += [line | provenance() for line in lines]
        if options.out:  # after each case, so that a run cut short leaves what it measured
            write_rows(options.out, rows)
    return 0 if all_within else 1


if __name__ == "__main__":
    sys.exit(main())
