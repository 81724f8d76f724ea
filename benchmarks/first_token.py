"""From the start of a process to its first token: ``python benchmarks/first_token.py [MODEL] [--out FILE.csv]``.

Each round starts ``python -m rooflama run`` twice, with a new folder as Triton's cache. The first process finds it
empty (``cold``) and compiles the kernels; the second one finds what the first compiled (``warm``). A time ends when the
first byte of the answer arrives. A row has the median of all rounds, and the processor time of a whole process, which
other programs on the machine disturb less. On a CPU nothing is compiled, so that both rows measure the same.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rooflama import demo_checkpoint
from timing import provenance, write_rows

PROMPT = "The sky is"


class Sample(NamedTuple):
    """One process: seconds until the first byte of its answer, and its processor time, user and system, to the end."""

    first_token_s: float
    processor_s: float


def sample(model: str, cache: str) -> Sample:
    """Start a process that uses the folder ``cache``. Raises SystemExit with its message if it fails."""
    # -P: not the folder rooflama of the current directory, which is only a part of the package
    command = [sys.executable, "-P", "-m", "rooflama", "run", model, PROMPT, "--max-new-tokens", "1"]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        elapsed = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors.decode(errors="replace"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as for rooflama run; the demo checkpoint by default")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes")
    parser.add_argument("--out", type=Path, help="write the rows there, as CSV")
    options = parser.parse_args()
    model = options.model or str(demo_checkpoint())
    samples: dict[str, list[Sample]] = {"cold": [], "warm": []}
    for _ in range(options.rounds):
        with TemporaryDirectory(prefix="rooflama-triton-") as cache:
            for taken in samples.values():
                taken.append(sample(model, cache))
    rows = []
    for state, taken in samples.items():
        times = [one.first_token_s for one in taken]
        seconds = {
            "first_token_s": statistics.median(times),
            "fastest_s": min(times),
            "slowest_s": max(times),
            "processor_s": statistics.median(one.processor_s for one in taken),
        }
        shown = {name: f"{value:.2f}" for name, value in seconds.items()}
        print(f"{state}:", ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        rows.append({"model": Path(model).name, "cache": state, "rounds": len(taken), **shown, **provenance()})
    if options.out:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
