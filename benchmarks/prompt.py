"""Whole prompts of models with random weights: ``python benchmarks/prompt.py [--out FILE.csv] [--only REGEX]``.

A row has the seconds from a prompt's tokens on the host to the logits of its last token, the median of REPEATS after
the pass has been captured as a CUDA graph, where passes are captured; and the same without captured passes. Each model
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rooflama.models.serving.passes import captured_sizes
from rooflama.models.serving.runner import ModelRunner
from step import Case, random_runner
from timing import provenance, write_rows

REPEATS, WARM_UP = 7, 3
TOKENS = (16, 64, 256, 512, 1024, 4096, 32768)
MODELS = [
    *(Case("Llama-3-8B", types, 1, 0) for types in ("Q4_K_M", "Q8_0", "BF16")),
    Case("SmolLM2-135M", "Q4_1", 1, 0),
    Case("Llama-3-8B", "Q4_K_M", 1, 0, batch_invariant=True),
]


def seconds_of(runner: ModelRunner, num_tokens: int) -> float:
    """The median time of a prompt of this many tokens."""
    prompt = torch.randint(0, runner.decoder.config.vocab_size, (num_tokens,), device="cpu").tolist()
    times = []
    for _ in range(WARM_UP + REPEATS):
        sequence = runner.cache.add()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _, hidden in runner.prefill([sequence], [prompt], [num_tokens]):
            last = hidden[-1:]
        runner.decoder.logits(last)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        runner.cache.free(sequence)
    return statistics.median(times[WARM_UP:])


def run_model(case: Case) -> list[dict[str, Any]]:
    longest = 4096 if case.batch_invariant else max(TOKENS) if case.model == "Llama-3-8B" else 8192
    rows = []
    with random_runner(case, longest) as (runner, _, _):
        for num_tokens in [count for count in TOKENS if count <= longest]:
            row: dict[str, Any] = {"model": case.model, "types": case.types, "batch_invariant": case.batch_invariant}
            row["tokens"] = num_tokens
            seconds = seconds_of(runner, num_tokens)
            row |= {"ms": f"{seconds * 1e3:.2f}", "tokens_per_s": f"{num_tokens / seconds:.0f}"}
            if num_tokens <= captured_sizes(runner.decoder.config)[-1]:
                with mock.patch("rooflama.models.serving.runner.replays", return_value=False):
                    row["ms_without_capture"] = f"{seconds_of(runner, num_tokens) * 1e3:.2f}"
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    parser.add_argument("--only", default="", metavar="REGEX", help="models and types that match")
    parser.add_argument("--model", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is not None:
        print(json.dumps(run_model(MODELS[options.model])))
        return 0
    rows = []
    for number, case in enumerate(MODELS):
        if not re.search(options.only, str(case)):
            continue
        done = subprocess.run([sys.executable, __file__, "--model", str(number)], capture_output=True, text=True)
        if done.returncode:
            print(f"{case.model} {case.types}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        for row in json.loads(done.stdout.strip().splitlines()[-1]):
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append({"ms_without_capture": "", **row, **provenance()})
    if options.out and rows:
        write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
