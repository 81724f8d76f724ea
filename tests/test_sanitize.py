"""What ``benchmarks/sanitize.py`` reads from the output of compute-sanitizer."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def sanitize():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("sanitize", FOLDER / "sanitize.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "sanitize", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


PASSED = "=" * 9 + " COMPUTE-SANITIZER\n....s\n4 passed, 1 skipped in 3.14s\n" + "=" * 9


def test_a_clean_run(sanitize):
    for summary in (" ERROR SUMMARY: 0 errors\n", " RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"):
        result = sanitize.read_output(PASSED + summary)
        assert result == sanitize.Result(passed=4, skipped=1, failed=0, reported=0)
        assert result.clean


@pytest.mark.parametrize(
    "output",
    [
        PASSED + " ERROR SUMMARY: 1 error\n",
        PASSED + " RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n",
        PASSED + " Error: process didn't terminate successfully\n",  # no summary
        "========= COMPUTE-SANITIZER\n...\n========= ERROR SUMMARY: 0 errors\n",  # pytest did not finish
        PASSED.replace("4 passed", "1 failed, 3 passed") + " ERROR SUMMARY: 0 errors\n",
        PASSED.replace("1 skipped", "1 error") + " ERROR SUMMARY: 0 errors\n",
    ],
)
def test_anything_else_is_not_clean(sanitize, output):
    assert not sanitize.read_output(output).clean


def test_the_suite_is_collected_whole(sanitize):
    ids = sanitize.collect()
    assert len(ids) > 400
    assert {Path(name.split("::")[0]) for name in ids} == {
        path.relative_to(sanitize.ROOT) for path in (sanitize.ROOT / "tests" / "kernels").glob("test_*.py")
    }
    far = sanitize.apart("memcheck", ids)
    assert 10 < len(far) < 60
    left_out = set(far) - set(sanitize.apart("racecheck", ids))
    assert {name.split("::")[0] for name in left_out} == {sanitize.OUTPUTS}


def test_tests_that_need_torchs_allocator_run_apart(sanitize):
    """Without it a CUDA graph cannot be captured, and torch counts no memory."""
    sources = [path.read_text(encoding="utf-8") for path in (sanitize.ROOT / "tests" / "kernels").glob("test_*.py")]
    needing = [
        function.name
        for source in sources
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        if re.search(r"CUDAGraph\(|memory_allocated\(", ast.get_source_segment(source, function) or "")
    ]
    assert len(needing) >= 5
    assert [name for name in needing if not sanitize.APART.search(name)] == []
