"""The mutants of ``make mutants`` still fit the kernels. They are not run here, since that takes minutes."""

import ast
import subprocess
import sys

import pytest

import mutants
from equivalent_mutants import EQUIVALENT
from kernel_tests import KERNEL_TESTS, suite_of
from mutant_table import MUTANTS
from mutants import ROOT, Outcome
from rooflama.testing.mutations import mutations


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_replaces_text_that_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, f"update {mutant.name!r} in tests/mutant_table"
    assert (ROOT / mutant.tests.split("::")[0]).exists()


def test_a_group_is_run_alone(monkeypatch, capsys):
    """Even if the name of another group's mutant contains the word."""
    monkeypatch.setattr(mutants.Runner, "run", lambda *_: (Outcome("killed", "", 0.0), []))
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--no-baseline", "norm"])
    assert mutants.main() == 0
    lines = capsys.readouterr().out.splitlines()
    own = [mutant for mutant in MUTANTS if mutant.name.startswith("norm: ")]
    assert lines[-1] == f"{len(own)} of {len(own)} killed"
    assert len(lines) == len(own) + 1
    assert all(any(mutant.name in line for line in lines) for mutant in own)
    assert any("norm" in mutant.name for mutant in MUTANTS if mutant not in own)


def test_an_unknown_group_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "nrom"])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "unknown groups ['nrom']" in capsys.readouterr().err


GENERATED = mutations(ROOT, [f"kernels/{name}.py" for name in KERNEL_TESTS])


def test_generated_changes_are_valid_and_many():
    """Each kind stands for the places of its kind; all are programs."""
    assert len(GENERATED) > 1000
    for mutation in GENERATED:
        ast.parse(mutation.text)
        assert mutation.old != mutation.new
    load = "weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)"
    assert {
        ("mask = offs < hidden", "mask = offs <= hidden"),
        ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(1).to(tl.int64)"),
        (load, "weight = tl.load(weight_ptr + offs).to(tl.float32)"),
        (load, load.replace("0.0", "1.0")),
        (load, load.replace("+", "-")),
    } <= {(mutation.old, mutation.new) for mutation in GENERATED if mutation.file == "kernels/norm.py"}


def test_code_of_gpus_alone_is_not_changed():
    """In neither place does the text of the change come from the other branch, which the interpreter takes."""
    changed = {mutation.old for mutation in GENERATED if mutation.function in ("pack_bytes", "dot4")}
    assert not {line for line in changed if "asm" in line or "pack=1" in line or "permute" in line or "NVIDIA" in line}
    assert {"even, odd = tl.split(q)", "pairs = (even & 0xFFFF) | (odd << 16)"} & changed


@pytest.mark.parametrize("entry", EQUIVALENT, ids=[f"{function}: {new}" for function, _, new in EQUIVALENT])
def test_an_equivalent_mutant_is_still_generated(entry):
    assert entry in {mutation.key for mutation in GENERATED}, "update tests/equivalent_mutants.py"


def test_generated_changes_are_judged_by_the_suite_of_their_file(monkeypatch, capsys):
    """Except those known to be equivalent. A timeout counts as killed; a change that was not run does not count."""
    verdicts, ran = iter(["killed"] * 6 + ["timeout", "not run", "SURVIVED"]), []

    def run(self, tests, file, text):
        ran.append((tests, file))
        return Outcome(next(verdicts, "killed"), "", 0.0), []

    monkeypatch.setattr(mutants.Runner, "run", run)
    drawn = [mutation for mutation in GENERATED if mutation.file == "kernels/mlp.py"][:10]
    monkeypatch.setattr(mutants, "EQUIVALENT", {drawn[0].key: "for the test"})
    runner = mutants.Runner(mutants.copy_tree, 1, 1, 1)
    assert mutants.run_generated(runner, drawn, mutants.tests_of, mutants.EQUIVALENT) == 1
    assert ran == [(suite_of("mlp"), "kernels/mlp.py")] * 9
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "1 equivalent, 6 killed, 1 timeout, 1 not run, 1 SURVIVED: score 87.5% of 8"


def test_every_kernel_file_has_tests_and_every_test_file_a_kernel():
    listed = {ROOT / test for name in KERNEL_TESTS for test in suite_of(name)}
    assert listed == set((ROOT / "tests" / "kernels").glob("test_*.py"))


def test_collecting_imports_no_compiler_and_no_notebooks():
    """Which take longer than the laws of a small kernel."""
    command = [sys.executable, "-X", "importtime", "-m", "pytest", "-s", "-q", "--collect-only"]
    done = subprocess.run([*command, *suite_of("mlp")], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"torch", "rooflama.kernels"} <= imported
    assert not imported & {"nbmake", "nbclient", "transformers", "torch._dynamo", "torch._inductor"}
