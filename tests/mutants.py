"""Check that the suite finds bugs: plant one at a time in a copy of the kernels and run the tests that should fail.

    python tests/mutants.py                          every mutant of mutant_table
    python tests/mutants.py norm rope                those of these groups: the word before the colon of a name
    python tests/mutants.py --generate 200 --seed 0  200 random small changes to the kernels (testing/mutations.py)
    python tests/mutants.py --generate 20 sampling   20 to kernels/sampling.py

First the tests run without a bug. A mutant of the table must make its own tests fail. Exit status 1: one survives, runs
out of time, or the text that it replaces is not in the file exactly once. A generated change must make a test of its
kernel file (kernel_tests.py) fail or run out of time, unless equivalent_mutants.py says why no test can. Exit status 1:
fewer than 97% do. Everything runs on the CPU, in copies, but for mutants of code that only a Hopper GPU can run: those
are skipped, with that reason, where there is none.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from equivalent_mutants import EQUIVALENT
from kernel_tests import KERNEL_TESTS, suite_of
from mutant_table import MUTANTS, Mutant
from rooflama.testing.mutations import Mutation, mutations

ROOT = Path(__file__).resolve().parent.parent
LEAST_SCORE = 0.97
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
    """Runs tests in copies of the package, each within ``timeout`` seconds and all before ``deadline``."""

    def __init__(self, jobs: int, timeout: float, deadline: float):
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
        self, tests: list[str], file: str = "", text: str = "", *, first_only: bool = True, on_gpu: bool = False
    ) -> tuple[Outcome, list[str]]:
        """(outcome, failed tests) with ``text`` in place of ``file``, whose path is from the repository's root."""
        start = time.monotonic()
        limit = min(self.timeout, self.deadline - start)
        if limit <= 0:
            return Outcome("not run", "no time left", 0.0), []
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            tree = Path(folder)
            copy_tree(tree)
            if file:
                (tree / "rooflama" / file).write_text(text)
            command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
            command += ["-x"] if first_only else []
            command += [f"--deselect={test}" for test in self.deselected]
            status, lines = _output([*command, *tests], tree, limit, {} if on_gpu else ON_THE_CPU)
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


def copy_tree(target: Path) -> None:
    """Copy the kernels, with what their tests import of ``rooflama``, as an importable package; and the tests."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    (target / "rooflama").mkdir()
    (target / "rooflama" / "__init__.py").touch()
    for room in ("kernels", "loaders"):
        shutil.copytree(ROOT / room, target / "rooflama" / room, ignore=ignored)
    shutil.copytree(ROOT / "rooflama" / "testing", target / "rooflama" / "testing", ignore=ignored)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    # The ci profile's examples, without the time that shrinking a failure takes.
    with (target / "tests" / "conftest.py").open("a") as conftest:
        phases = "[Phase.explicit, Phase.generate]"
        conftest.write(f'\nsettings.register_profile("mutants", settings.get_profile("ci"), phases={phases})\n')
        conftest.write('settings.load_profile("mutants")\n')


def _output(command: list[str], tree: Path, seconds: float, device: dict[str, str]) -> tuple[int | None, list[str]]:
    """(exit status, None if time ran out; the lines it printed)."""
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **device, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
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


def run_table(runner: Runner, chosen: list[Mutant]) -> int:
    def kill(mutant: Mutant) -> Outcome:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            return Outcome("stale", f"{text.count(mutant.old)} places match in {mutant.file}", 0.0)
        text = text.replace(mutant.old, mutant.new)
        if not mutant.needs_hopper:
            return runner.run([mutant.tests], mutant.file, text)[0]
        if not has_hopper():
            return Outcome("skipped", "needs a GPU of compute capability 9.x", 0.0)
        return runner.run([mutant.tests], mutant.file, text, on_gpu=True)[0]

    killed = skipped = 0
    for mutant, (verdict, reason, seconds) in runner.each(kill, chosen):
        killed += verdict == "killed"
        skipped += verdict == "skipped"
        print(f"{verdict:9} {seconds:5.0f} s  {mutant.name:52} {reason}", flush=True)
    print(f"{killed} of {len(chosen) - skipped} killed" + (f", {skipped} skipped" if skipped else ""))
    return 0 if killed + skipped == len(chosen) else 1


@functools.cache
def has_hopper() -> bool:
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9


def run_generated(runner: Runner, chosen: list[Mutation]) -> int:
    def kill(mutation: Mutation) -> Outcome:
        return runner.run(suite_of(Path(mutation.file).stem), mutation.file, mutation.text)[0]

    judged = [mutation for mutation in chosen if mutation.key not in EQUIVALENT]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = sorted({mutant.group for mutant in MUTANTS})
    parser.add_argument(
        "groups",
        nargs="*",
        metavar="GROUP",
        help=f"of {', '.join(groups)}; with --generate, names of kernel files; all by default",
    )
    parser.add_argument("--generate", type=int, metavar="N", help="draw N changes instead of taking those of the table")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one test run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of everything; the rest is not run")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass as they are")
    options = parser.parse_args()
    known = groups if options.generate is None else list(KERNEL_TESTS)
    if unknown := set(options.groups) - set(known):
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(known)}")
    runner = Runner(options.jobs, options.timeout, time.monotonic() + options.seconds)
    names = options.groups or known

    if options.generate is None:
        table = [mutant for mutant in MUTANTS if mutant.group in names]
        files = sorted({mutant.tests.split("::")[0] for mutant in table})
        if not options.no_baseline and not check_baseline(runner, files):
            return 1
        return run_table(runner, table)
    every = mutations(ROOT, [f"kernels/{name}.py" for name in sorted(names)])
    drawn = random.Random(options.seed).sample(every, min(options.generate, len(every)))
    if not options.no_baseline:
        check_baseline(runner, sorted({tests for mutation in drawn for tests in suite_of(Path(mutation.file).stem)}))
    return run_generated(runner, drawn)


if __name__ == "__main__":
    sys.exit(main())
