"""The seeded bugs of ``make mutants`` still fit the kernels; running them takes minutes and is not done here."""

import sys

import pytest

import mutants
from mutant_table import MUTANTS
from mutants import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_replaces_text_that_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, f"update {mutant.name!r} in tests/mutant_table.py"
    assert (ROOT / mutant.tests.split("::")[0]).exists()


def test_a_group_is_run_alone(monkeypatch, capsys):
    """Also where the name of another group's mutant contains the word."""
    monkeypatch.setattr(mutants, "kill", lambda mutant, seconds: ("killed", "", 0.0))
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--no-baseline", "norm"])
    assert mutants.main() == 0
    lines = capsys.readouterr().out.splitlines()
    own = [mutant for mutant in MUTANTS if mutant.name.startswith("norm: ")]
    assert lines[-1] == f"{len(own)} of {len(own)} killed"
    assert all(mutant.name in line for mutant, line in zip(own, lines[:-1], strict=True))
    assert any("norm" in mutant.name for mutant in MUTANTS if mutant not in own)


def test_an_unknown_group_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "nrom"])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "unknown groups ['nrom']" in capsys.readouterr().err
