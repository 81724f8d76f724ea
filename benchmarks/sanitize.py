"""The kernel suite on a GPU under compute-sanitizer: ``python benchmarks/sanitize.py [--jobs N] [--out FILE.csv]``.

memcheck finds reads and writes out of bounds, racecheck finds races between warps in shared memory. Each property draws
one case. The tests are distributed over processes, each under its own sanitizer, because processes under one sanitizer
wait for its connections.

Two settings differ from an ordinary run:

- torch's caching allocator is off, since it would hide accesses beside a buffer. A CUDA graph cannot be captured, and
  scratch not counted, without it, so the tests of ``APART`` run with it, each in a process of its own. (Under the
  sanitizer their gigabytes stay allocated when the test is over: 72.5 GiB after eleven of them.)
- torch's own kernels (at::native) are not checked.

racecheck skips the tests of ``OUTPUTS``, whose launches of hundreds of thousands of programs take minutes under it.
They differ from other tests of the same kernels only in their offsets, which memcheck covers.

Exit status 1 if a test fails or a sanitizer reports anything. The result is one row per tool.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from timing import provenance, write_rows

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
APART = re.compile("beyond_int32|graph_is_replayed|replayed_graph|two_graphs|scratch_it_states|share_scratch")
OUTPUTS = "tests/kernels/test_beyond_int32_outputs.py"
PYTEST = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SANITIZER = [
    "compute-sanitizer",
    "--target-processes=application-only",
    "--max-connections=1000",  # ports that sanitizers on one machine try in turn
    "--launch-timeout=0",
    "--kernel-name-exclude=kns=native",
    "--error-exitcode=9",
]
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
OUTCOMES = re.compile(r"\b(\d+) (passed|failed|skipped|error)")


@dataclass(frozen=True)
class Result:
    """The result of one process under a sanitizer. ``reported`` is None if the sanitizer printed no summary."""

    passed: int
    skipped: int
    failed: int
    reported: int | None

    @property
    def clean(self) -> bool:
        return self.failed == 0 and self.reported == 0


def read_output(text: str) -> Result:
    """The result in pytest's closing line and the sanitizer's summary."""
    closing = [line for line in text.splitlines() if OUTCOMES.search(line) and " in " in line]
    counts = {word: int(number) for number, word in OUTCOMES.findall(closing[-1])} if closing else {"failed": 1}
    reported = [int(errors or hazards) for errors, hazards in SUMMARY.findall(text)]
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return Result(
        counts.get("passed", 0), counts.get("skipped", 0), failed, sum(reported) if len(reported) == 1 else None
    )


def collect() -> list[str]:
    """The node ids of the kernel suite."""
    listing = subprocess.run([*PYTEST, "--collect-only", "tests/kernels"], cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in listing.stdout.splitlines() if "::" in line]
    if listing.returncode or not ids:
        sys.exit(f"the kernel suite cannot be collected:\n{listing.stdout}{listing.stderr}")
    return ids


def apart(tool: str, ids: Sequence[str]) -> list[str]:
    """The tests that run in a process of their own under this tool."""
    return [name for name in ids if APART.search(name) and not (tool == "racecheck" and name.startswith(OUTPUTS))]


def run(tool: str, ids: Sequence[str], *, gpu: int, caching: bool) -> Result:
    """Run these tests under ``tool`` on GPU number ``gpu``. Prints all output unless it is clean."""
    environment = {
        **os.environ,
        "HYPOTHESIS_PROFILE": "smoke",
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "OMP_NUM_THREADS": "1",
        **({} if caching else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    }
    start = time.monotonic()
    done = subprocess.run(
        [*SANITIZER, f"--tool={tool}", *PYTEST, *ids],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    result = read_output(done.stdout)
    if done.returncode or not result.clean:
        print(done.stdout)
    print(f"{tool}: {len(ids)} tests in {time.monotonic() - start:.0f} s, exit {done.returncode}, {result}", flush=True)
    return result if done.returncode == 0 or not result.clean else Result(result.passed, result.skipped, 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "sanitizer.csv")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus:
        sys.exit("compute-sanitizer needs a CUDA GPU")
    ids = collect()
    together = [name for name in ids if not APART.search(name)]
    shards = [together[start :: arguments.jobs] for start in range(arguments.jobs)]
    # Tests apart take turns for a GPU's memory by themselves: six processes hide how long each takes to start.
    with ThreadPoolExecutor(arguments.jobs) as threads, ThreadPoolExecutor(6) as threads_apart:
        tasks = [(tool, threads, shard) for tool in TOOLS for shard in shards if shard]
        tasks += [(tool, threads_apart, [name]) for tool in TOOLS for name in apart(tool, ids)]
        jobs = [
            (tool, pool.submit(run, tool, names, gpu=i % gpus, caching=pool is threads_apart))
            for i, (tool, pool, names) in enumerate(tasks)
        ]
        results = [(tool, job.result()) for tool, job in jobs]
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    rows = []
    for tool in TOOLS:
        own = [result for name, result in results if name == tool]
        row = {
            "tool": tool,
            "passed": sum(r.passed for r in own),
            "skipped": sum(r.skipped for r in own),
            "failed": sum(r.failed for r in own),
            "reported": "unfinished" if any(r.reported is None for r in own) else sum(r.reported or 0 for r in own),
            "sanitizer": (re.findall(r"Version ([\d.]+)", version) or ["unknown"])[0],
            **provenance(),
        }
        rows.append(row)
        print(row)
    write_rows(arguments.out, rows)
    if not all(result.clean for _, result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
