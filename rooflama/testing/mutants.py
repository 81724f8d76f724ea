"""Check that tests find bugs: plant small ones in a Triton file, one at a time, and run its tests in a copy.

    python -m rooflama.testing.mutants theirs.py --test test_theirs.py --generate 20

The current folder is copied for each change, so that files lie as they do now. A change (mutations.py) must make a test
fail or run out of time. Exit status 1: fewer than 97% do. Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from .mutations import Mutation, mutations

LEAST_SCORE = 0.97
PROFILE = {"HYPOTHESIS_PROFILE": "mutants"}  # the ci profile's cases, without the time that shrinking a failure takes
ON_THE_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Outcome(NamedTuple):
    verdict: str
    reason: str
    seconds: float


class Runner:
    """Runs tests in copies, each within ``timeout`` seconds and all before ``deadline``.

    ``copy`` fills an empty folder with what the tests need. ``prefix`` is where a mutated file lies in it.
    """

    def __init__(self, copy: Callable[[Path], None], jobs: int, timeout: float, deadline: float, *, prefix: str = "."):
        self.copy, self.prefix = copy, prefix
        self.jobs = jobs
        self.timeout = timeout
        self.deadline = deadline
        self.deselected: list[str] = []  # tests that fail without a mutant

    def each(self, function: Callable, things: list) -> Iterator[tuple]:
        """(thing, function(thing)), in the order in which they end."""
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = {pool.submit(function, thing): thing for thing in things}
            for done in as_completed(waiting):
                yield waiting[done], done.result()

    def run(
        self, tests: list[str], file: str = "", text: str = "", *, first_only: bool = True
    ) -> tuple[Outcome, list[str]]:
        """(outcome, failed tests) with ``text`` in place of ``file``, whose path is from the repository's root."""
        start = time.monotonic()
        limit = min(self.timeout, self.deadline - start)
        if limit <= 0:
            return Outcome("not run", "no time left", 0.0), []
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            tree = Path(folder)
            self.copy(tree)
            if file:
                (tree / self.prefix / file).write_text(text)
            command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
            command += ["-x"] if first_only else []
            command += [f"--deselect={test}" for test in self.deselected]
            status, lines = _output([*command, *tests], tree, limit, PROFILE | ON_THE_CPU)
        seconds = time.monotonic() - start
        if status is None:
            return Outcome(
                "timeout" if limit == self.timeout else "not run", f"no answer in {limit:.0f} s", seconds
            ), []
        failures = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
        if status < 0:
            return Outcome("killed", f"died on signal {-status}", seconds), failures
        verdict = {0: "SURVIVED", 1: "killed"}.get(status, "BROKEN")
        if verdict == "BROKEN" and failures:  # the change is refused when the file is imported
            verdict = "killed"
        return Outcome(verdict, (failures or lines[-1:] or [""])[0], seconds), failures


def _output(command: list[str], tree: Path, seconds: float, variables: dict[str, str]) -> tuple[int | None, list[str]]:
    """(exit status, None if time ran out; the lines it printed)."""
    environment = {**os.environ, **variables, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [environment.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # tests that start processes of their own, too
            return None, []
        return process.returncode, printed.strip().splitlines()


def check_baseline(runner: Runner, files: list[str]) -> bool:
    """Whether all test files pass without a bug. Tests that fail are printed and deselected from then on."""
    for tests, (outcome, failures) in runner.each(lambda tests: runner.run([tests], first_only=False), files):
        if outcome.verdict != "SURVIVED":
            print(f"{tests} fails without a mutant: {failures or outcome.reason}", file=sys.stderr, flush=True)
            runner.deselected += [failure.split()[1] for failure in failures]
    return not runner.deselected


def run_generated(
    runner: Runner,
    chosen: list[Mutation],
    tests_of: Callable[[Mutation], list[str]],
    equivalent: Container[tuple[str, str, str]] = (),
) -> int:
    """Exit status: 0 if the tests of at least LEAST_SCORE of the changes fail or run out of time."""

    def kill(mutation: Mutation) -> Outcome:
        return runner.run(tests_of(mutation), mutation.file, mutation.text)[0]

    judged = [mutation for mutation in chosen if mutation.key not in equivalent]
    count = Counter({"equivalent": len(chosen) - len(judged)})
    survivors = []
    for mutation, (verdict, reason, seconds) in runner.each(kill, judged):
        count[verdict] += 1
        if verdict not in ("killed", "timeout", "not run"):
            survivors.append(mutation)
        print(f"{verdict:9} {seconds:5.0f} s  {mutation}\n{'':20}{reason}", flush=True)
    print(f"\n{len(survivors)} survivors", *sorted(map(str, survivors)), sep="\n  ")
    if runner.deselected:
        print("left out, because they fail without a mutant:", *runner.deselected, sep="\n  ")
    total = len(judged) - count["not run"]
    score = (total - len(survivors)) / max(total, 1)
    print(f"{', '.join(f'{n} {verdict}' for verdict, n in count.items())}: score {score:.1%} of {total}")
    return 0 if score >= LEAST_SCORE else 1


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder without what tools keep in it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def options_of_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one test run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of everything; the rest is not run")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass as they are")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rooflama.testing.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="with @triton.jit functions, in the current folder or below")
    parser.add_argument("--test", action="append", required=True, help="a test file or test; repeatable")
    parser.add_argument("--generate", type=int, default=20, metavar="N", help="draw N changes")
    options_of_runs(parser)
    options = parser.parse_args(arguments)
    root = Path.cwd()
    every = mutations(root, [str(options.file)])
    if not every:
        parser.error(f"{options.file} has no @triton.jit function in which anything could change")
    deadline = time.monotonic() + options.seconds
    runner = Runner(lambda tree: copy_folder(root, tree), options.jobs, options.timeout, deadline)
    if not options.no_baseline and not check_baseline(runner, options.test):
        return 1
    drawn = random.Random(options.seed).sample(every, min(options.generate, len(every)))
    return run_generated(runner, drawn, lambda mutation: options.test)


if __name__ == "__main__":
    sys.exit(main())
