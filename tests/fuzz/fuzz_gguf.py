"""Fuzz the GGUF reader against the plain one, by hand:

    python tests/fuzz/fuzz_gguf.py --runs 200000 --seed 0        # random mutants of valid files
    python tests/fuzz/fuzz_gguf.py --atheris [libFuzzer options]  # guided by coverage; needs the package atheris

Either stops at the first input that crashes, hangs, takes too much memory, or is accepted or read otherwise than by the
plain reader, and keeps it as ``fuzz_gguf.crash``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def random_runs(runs: int, seed: int, memory_every: int) -> None:
    from gguf_files import small_file
    from gguf_mutations import check_any_input, random_mutant

    files = [small_file(version, order) for version in (2, 3) for order in "<>"]
    rng = np.random.default_rng(seed)
    accepted, slowest, start = 0, 0.0, time.perf_counter()
    for run in range(runs):
        data = random_mutant(rng, files)
        before = time.perf_counter()
        try:
            accepted += check_any_input(data, memory=run % memory_every == 0)
        except BaseException:
            Path("fuzz_gguf.crash").write_bytes(data)
            print(f"run {run} of seed {seed}: input kept in fuzz_gguf.crash", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - before)
    elapsed = time.perf_counter() - start
    print(f"{runs} inputs in {elapsed:.0f} s: {accepted} accepted, slowest {slowest * 1e3:.1f} ms, no fault")


def coverage_runs(options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["rooflama.loaders"]):
        from gguf_mutations import check_any_input

    atheris.Setup([sys.argv[0], *options], lambda data: check_any_input(bytes(data), memory=False))
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-every", type=int, default=10, help="measure memory on one input in so many")
    parser.add_argument("--atheris", action="store_true", help="guide by coverage")
    arguments, rest = parser.parse_known_args()
    if arguments.atheris:
        coverage_runs(rest)
    else:
        random_runs(arguments.runs, arguments.seed, arguments.memory_every)
