"""Whole decode steps of models with random weights: ``python benchmarks/step.py [--out FILE.csv] [--only REGEX]``.

Each case runs in a process of its own. The page pool is zero, and each sequence has a length of ``context`` tokens.
STEPS steps are timed together, after the step has been captured as a CUDA graph. A row has the tokens per second of all
sequences together, and their fraction of the roofline: weights, keys and values read once per step at the copy rate of
the same GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import memory_plan_check
from memory_plan_check import RandomSource, ShapesOnly, config_of
from rooflama.loaders.device import open_device
from rooflama.loading import start_runner
from rooflama.models import (
    CheckpointReader,
    Decoder,
    DecodeSlots,
    ModelConfig,
    ModelRunner,
    Request,
    SamplingParams,
    Sequence,
    adapter_for,
)
from rooflama.planning import plan_for_device
from timing import by_kernel, ceilings, provenance, write_rows

STEPS = 64
WARM_UP = 6  # an eager step, the capture, and replays


@dataclass(frozen=True)
class Case:
    """One line of the table. ``types``: ``Q4_K_M``, or one type for every matrix."""

    model: str
    types: str
    sequences: int
    context: int
    batch_invariant: bool = False

    def __str__(self) -> str:
        kind = f"{self.types} batch-invariant" if self.batch_invariant else self.types
        return f"{self.model} {kind} {self.sequences} x {self.context}"


CASES = [
    *(Case("Llama-3-8B", "Q4_K_M", 1, context) for context in (0, 16384, 32768)),
    *(Case("Llama-3-8B", types, 1, 0) for types in ("Q8_0", "Q4_0", "BF16")),
    Case("Llama-3-8B", "Q4_K_M", 2, 1024),
    *(
        Case("Llama-3-8B", types, sequences, 1024)
        for types in ("Q4_K_M", "Q8_0", "BF16")
        for sequences in (1, 8, 32, 64)
    ),
    *(Case("Llama-3-8B", "Q4_K_M", sequences, 1024, batch_invariant=True) for sequences in (1, 8, 64)),
    *(Case("SmolLM2-135M", "Q4_1", 1, context) for context in (0, 4096)),
]


def types_of(case: Case) -> Callable[..., Callable[[str, tuple[int, ...]], str]]:
    """The rule that ``ShapesOnly`` asks for each matrix's type."""
    if case.types in ("Q4_K_M", "Q4_1"):
        return memory_plan_check.type_of
    return lambda config: lambda name, shape: case.types


@contextmanager
def random_runner(case: Case, spare_tokens: int) -> Iterator[tuple[ModelRunner, int, ModelConfig]]:
    """A runner of the case's model with random weights, the bytes of the weights that a step reads, and the config.

    Its pages hold ``spare_tokens`` tokens per sequence more than the case's context.
    """
    config = dataclasses.replace(config_of(case.model), context_length=max(1, case.context) + spare_tokens)
    with mock.patch.object(memory_plan_check, "type_of", types_of(case)), open_device("cuda") as device:
        reader = CheckpointReader(ShapesOnly(config))
        plan = plan_for_device(reader, config, device, context=config.context_length, dtype="auto", kv_dtype="auto")
        source = RandomSource(reader, device, batch_invariant=case.batch_invariant)
        decoder = Decoder.load(source, config, adapter_for("llama"))
        read = (b for b in device.held() if config.tied_embeddings or b.label != "token_embd.weight")
        weights = sum(buffer.nbytes for buffer in read)
        with torch.inference_mode():
            yield start_runner(decoder, plan.but(sequences=case.sequences), device), weights, config


@contextmanager
def ready(case: Case) -> Iterator[tuple[DecodeSlots, int]]:
    """A batch whose step has been captured, and the bytes that a step must read in the middle of STEPS steps."""
    length = max(1, case.context)
    with random_runner(case, STEPS + WARM_UP + 64) as (runner, weights, config):
        slots = captured(runner, case.sequences, length)
        cached = case.sequences * (length + WARM_UP + STEPS // 2) * config.kv_bytes_per_token(2)
        yield slots, weights + int(cached)


def captured(runner: ModelRunner, sequences: int, length: int) -> DecodeSlots:
    """Sequences of ``length`` tokens in the cache, after the steps that compile and capture."""
    slots = DecodeSlots(runner, sequences, swaps={})
    for _ in range(sequences):
        cache_id = runner.cache.add()
        runner.cache.reserve(cache_id, runner.max_context)
        for start in range(0, length, runner.cache.max_append):
            runner.cache.append(cache_id, min(runner.cache.max_append, length - start))
        sequence = Sequence(Request([0], None, SamplingParams()), cache_id=cache_id, num_cached=length)
        slots.join(sequence, limit=runner.max_context)
    for _ in range(WARM_UP):
        slots.step()
    torch.cuda.synchronize()
    return slots


def run_case(case: Case, *, profile: bool = False) -> dict[str, float]:
    """Seconds of a step, and the bytes that it must read. ``profile`` prints the kernels' times to stderr."""
    with ready(case) as (slots, num_bytes):
        started = time.perf_counter()
        for _ in range(STEPS):
            slots.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / STEPS
        if profile:
            for name, (launches, us) in by_kernel(slots.step, repeats=8).items():
                print(f"  {us:9.1f} us {launches:6.0f} x {name[:80]}", file=sys.stderr)
        return {"seconds": seconds, "bytes": num_bytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose line matches")
    parser.add_argument("--profile", action="store_true", help="print launches and microseconds per step and kernel")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(CASES[options.case], profile=options.profile)))
        return 0
    rate, _ = ceilings()
    torch.cuda.empty_cache()
    rows = []
    for number, case in enumerate(CASES):
        if not re.search(options.only, str(case)):
            continue
        command = [sys.executable, __file__, "--case", str(number), *["--profile"] * options.profile]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        if options.profile:
            print(done.stderr, end="", flush=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        share = found["bytes"] / rate / found["seconds"]
        tokens_per_s = case.sequences / found["seconds"]
        print(f"{case}: {tokens_per_s:,.0f} tokens/s, {share:.0%} of the roofline", flush=True)
        row = dataclasses.asdict(case)
        row |= {"ms": f"{found['seconds'] * 1e3:.3f}", "tokens_per_s": f"{tokens_per_s:.1f}"}
        rows.append(row | {"of_roofline": f"{share:.3f}", "copy_tb_per_s": f"{rate / 1e12:.2f}", **provenance()})
    if options.out and rows:
        write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
