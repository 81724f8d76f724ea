"""The seeded bugs of ``make mutants`` still fit the kernels; running them takes minutes and is not done here."""

import pytest

from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_replaces_text_that_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, f"update {mutant.name!r} in tests/mutants.py"
    assert (ROOT / mutant.tests.split("::")[0]).exists()
