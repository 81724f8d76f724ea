"""Check that the suite finds bugs: plant one at a time in a copy of the kernels and run the tests that should fail.

    python tests/mutants.py                          every mutant of mutant_table
    python tests/mutants.py norm rope                those of these groups: the word before the colon of a name
    python tests/mutants.py --generate 200 --seed 0  200 random small changes to the kernels (testing/mutations.py)
    python tests/mutants.py --generate 20 sampling   20 to kernels/sampling.py

First the tests run without a bug. A mutant of the table must make its own tests fail. Exit status 1: one survives, runs
out of time, or the text that it replaces is not in the file exactly once. A generated change must make a test of its
kernel file (kernel_tests.py) fail or run out of time, unless equivalent_mutants.py says why no test can. Exit status 1:
fewer than 97% do. Everything runs on the CPU, in copies.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

from equivalent_mutants import EQUIVALENT
from kernel_tests import KERNEL_TESTS, suite_of
from mutant_table import MUTANTS, Mutant
from rooflama.testing.mutants import Outcome, Runner, check_baseline, options_of_runs, run_generated
from rooflama.testing.mutations import Mutation, mutations

ROOT = Path(__file__).resolve().parent.parent


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


def tests_of(mutation: Mutation) -> list[str]:
    return suite_of(Path(mutation.file).stem)


def run_table(runner: Runner, chosen: list[Mutant]) -> int:
    def kill(mutant: Mutant) -> Outcome:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            return Outcome("stale", f"{text.count(mutant.old)} places match in {mutant.file}", 0.0)
        return runner.run([mutant.tests], mutant.file, text.replace(mutant.old, mutant.new))[0]

    killed = 0
    for mutant, (verdict, reason, seconds) in runner.each(kill, chosen):
        killed += verdict == "killed"
        print(f"{verdict:9} {seconds:5.0f} s  {mutant.name:52} {reason}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


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
    options_of_runs(parser)
    options = parser.parse_args()
    known = groups if options.generate is None else list(KERNEL_TESTS)
    if unknown := set(options.groups) - set(known):
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(known)}")
    runner = Runner(copy_tree, options.jobs, options.timeout, time.monotonic() + options.seconds, prefix="rooflama")
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
    return run_generated(runner, drawn, tests_of, EQUIVALENT)


if __name__ == "__main__":
    sys.exit(main())
