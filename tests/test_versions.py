"""Every bound of pyproject.toml is a version that something runs: `make test-versions`, or the target of a tool."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pinned(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / file).read_text(), re.MULTILINE))


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
TOOLS = [requirement for extra in ("lint", "docs", "notebooks") for requirement in EXTRAS.pop(extra)]
TOOLS = [requirement for requirement in TOOLS if not requirement.startswith("rooflama[")]
REQUIREMENTS = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(requirement for extra in EXTRAS.values() for requirement in extra if not requirement.startswith("rooflama[")),
]


@pytest.mark.parametrize(
    ("requirements", "file"), [(REQUIREMENTS, "constraints-oldest.txt"), (TOOLS, "constraints.txt")]
)
def test_a_bound_is_a_version_that_is_run(requirements, file):
    """jupyterlab, which only opens the notebooks, has no bound."""
    versions = pinned(file)
    for requirement in requirements:
        name, bound = re.fullmatch(r"([\w-]+)(?:>=([\w.]+))?", requirement).groups()
        if bound is None:
            assert name == "jupyterlab"
        else:
            assert Version(versions[name]) == Version(bound), f"{requirement}: {file} has {versions[name]}"


def test_the_oldest_versions_are_bounds():
    assert pinned("constraints-oldest.txt").keys() == {re.split(">=", requirement)[0] for requirement in REQUIREMENTS}
