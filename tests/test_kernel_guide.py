"""docs/ADDING_A_KERNEL.md, done in a copy of the repository: its four files are all that a kernel needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "ADDING_A_KERNEL.md"

FOUND_BY_NAME = """
import sys
sys.path[:0] = ["tests", "benchmarks"]
import cases, kernel_tests, registry
from rooflama import kernels, roofline
from rooflama.kernel_card import kernel_card
from model_calls import EVERYTHING

assert kernel_tests.suite_of("softcap") == ["tests/kernels/test_softcap.py"]
card = kernel_card("softcap").markdown()
assert card.count("def softcap(") == 1
assert "- odd" in card
assert any("softcap" in line for line in roofline.table(roofline.measurements()).splitlines()[-1:])
assert "softcap" in {call.function.__name__ for _, call in registry.calls([EVERYTHING])}
cases.CUDA, cases.copies = "cpu", lambda num_bytes: 1
case = next(registry.MEASURED["softcap"]())
with kernels.use_backend("numpy"):
    ours, peer = (calls[0]() for calls in case.implementations.values())
assert (ours - peer).abs().max() < 1e-4
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the guide's files, and a folder from which it is imported as ``rooflama``."""
    tree = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "loaders", "models")
    for folder in ("kernels", "rooflama", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored if folder == "tests" else None)
    for folder in ("loaders", "models"):
        (tree / folder).symlink_to(ROOT / folder)
    shutil.copy(ROOT / "pyproject.toml", tree)
    package = tree / "import" / "rooflama"
    package.mkdir(parents=True)
    for path in (*(tree / "rooflama").iterdir(), *(tree / name for name in ("kernels", "loaders", "models"))):
        (package / path.name).symlink_to(path)
    files = re.findall(r"^`([\w/]+\.py)`\..*?^```python\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(files) == 4
    for name, text in files:
        assert Path(name).name in ("softcap.py", "test_softcap.py")
        (tree / name).write_text(text)
    return tree


def run(tree, *command):
    environment = {**os.environ, "PYTHONPATH": str(tree / "import"), "HYPOTHESIS_PROFILE": "smoke"}
    done = subprocess.run([sys.executable, "-P", *command], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_laws_of_the_new_kernel_hold(copy):
    assert "3 passed" in run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_softcap.py")


def test_everything_else_finds_it_by_its_name(copy):
    run(copy, "-c", FOUND_BY_NAME)
