"""Does the suite notice? Plants one bug at a time in a copy of the kernels and runs the tests that should fail.

    python tests/mutants.py                every mutant
    python tests/mutants.py norm rope      those of these groups: what stands before the colon of a mutant's name

First every test file named must pass as it is. Then each mutant must make its own fail: exit status 1 if one survives,
runs out of time, or if the text it replaces is no longer there exactly once. Nothing is changed in place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


def copy_tree(target: Path) -> None:
    """The package as an importable ``rooflama`` folder, and the tests beside it."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    shutil.copytree(ROOT / "rooflama", target / "rooflama", ignore=ignored)
    for room in ("kernels", "models", "loaders"):
        shutil.copytree(ROOT / room, target / "rooflama" / room, ignore=ignored)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    # The ci profile's examples, without the time that shrinking a failure takes.
    with (target / "tests" / "conftest.py").open("a") as conftest:
        phases = "[Phase.explicit, Phase.generate]"
        conftest.write(f'\nsettings.register_profile("mutants", settings.get_profile("ci"), phases={phases})\n')
        conftest.write('settings.load_profile("mutants")\n')


def run_tests(tree: Path, tests: str, seconds: float) -> tuple[int | None, str]:
    """(pytest's exit status, None if time ran out; the first failure or the last line)."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds:.0f} s"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (failures or lines[-1:])[0]


def kill(mutant: Mutant, seconds: float) -> tuple[str, str, float]:
    """(verdict, why, seconds) of one mutant."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = tree / "rooflama" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return "stale", f"{text.count(mutant.old)} places match in {mutant.file}", time.perf_counter() - start
        path.write_text(text.replace(mutant.old, mutant.new))
        status, reason = run_tests(tree, mutant.tests, seconds)
    if status is not None and status < 0:
        status, reason = 1, f"died on signal {-status}"
    verdict = {0: "SURVIVED", 1: "killed", None: "SLOW"}.get(status, "BROKEN")
    return verdict, reason.split(" - ")[0], time.perf_counter() - start


def passes(tests: str, seconds: float) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_tree(Path(folder))
        status, reason = run_tests(Path(folder), tests, seconds)
    return status == 0, reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = sorted({mutant.group for mutant in MUTANTS})
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)}; all by default")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of one test run")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass as they are")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(groups):
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(groups)}")
    chosen = [mutant for mutant in MUTANTS if mutant.group in (options.groups or groups)]

    with ThreadPoolExecutor(2) as pool:
        if not options.no_baseline:
            files = sorted({mutant.tests.split("::")[0] for mutant in chosen})
            for tests, (passed, reason) in zip(
                files, pool.map(lambda tests: passes(tests, options.seconds), files), strict=True
            ):
                if not passed:
                    print(f"{tests} fails without a mutant: {reason}", file=sys.stderr)
                    return 1
        survivors = 0
        for mutant, (verdict, reason, seconds) in zip(
            chosen, pool.map(lambda mutant: kill(mutant, options.seconds), chosen), strict=True
        ):
            survivors += verdict != "killed"
            print(f"{verdict:9} {seconds:5.0f} s  {mutant.name:52} {reason}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
