"""Every Python block of the README and of docs/ is executed by a test, and what pages state is what the code has."""

import re
import sys
from pathlib import Path

import pytest

from demo_oracle import checkpoint_path
from rooflama.environment import VARIABLES

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Pages whose blocks need more than to be run one after the other, and the tests that execute them.
OWN_TESTS = {
    "ADAPTER_PATTERN_GUIDE.md": "models/test_adapter_guide.py",
    "ADDING_A_KERNEL.md": "test_kernel_guide.py",
    "DEVICE_BOUNDARY.md": "test_device_boundary_guide.py",
    "GQA_AND_MHA.md": "test_gqa_guide.py",
    "TESTING_YOUR_KERNEL.md": "test_testing_guide.py",
    "INTEGRATIONS.md": "test_integrations_guide.py",
}


def blocks(page):
    return BLOCK.findall(page.read_text())


@pytest.mark.demo_checkpoint
@pytest.mark.usefixtures("numpy_backend")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.name not in OWN_TESTS], ids=lambda page: page.name
)
def test_the_blocks_of_a_page_run_one_after_the_other(page):
    namespace = {"path": checkpoint_path()}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", OWN_TESTS)
def test_a_page_with_its_own_test_is_read_there(page):
    test = (ROOT / "tests" / OWN_TESTS[page]).read_text()
    assert page in test
    assert "```" in test


def test_every_other_block_is_text():
    """A fence of another language would be code that nothing executes."""
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)", page.read_text(), flags=re.MULTILINE)) <= {"python"}, page.name


def test_the_page_of_environment_variables_lists_all():
    rows = re.findall(
        r"^\| (`[A-Z][A-Z_`, ]*`) \| (.*) \|$", (ROOT / "docs/ENVIRONMENT.md").read_text(), flags=re.MULTILINE
    )
    assert rows == [(", ".join(f"`{name}`" for name in v.names), v.effect) for v in VARIABLES]


def test_variables_that_the_code_reads_are_listed():
    files = [path for room in ("kernels", "loaders", "models", "rooflama") for path in (ROOT / room).rglob("*.py")]
    sources = "\n".join(path.read_text() for path in files)
    names = set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](\w+)""", sources))
    names |= set(re.findall(r"""["'](\w+)["'] in os\.environ""", sources))
    assert names >= {"ROOFLAMA_DEBUG", "COLUMNS"}
    assert names <= {name for v in VARIABLES for name in v.names}


@pytest.mark.demo_checkpoint
@pytest.mark.usefixtures("numpy_backend")
def test_the_pictures_show_what_the_code_does(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    checkpoint_path()
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import how_it_works

    monkeypatch.delitem(sys.modules, "how_it_works")
    how_it_works.draw(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 3
    for name in drawn:
        assert texts(ROOT / "docs" / name) == texts(tmp_path / name), f"{name} is old: python docs/site/how_it_works.py"
    assert how_it_works.arrows() >= {("rooflama", "models"), ("models", "loaders"), ("models", "kernels")}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())
