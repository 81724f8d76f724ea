"""docs/TESTING_YOUR_KERNEL.md: the kernel and the tests of the page run as files of another repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rooflama.testing import laws, mutants, plugin

GUIDE = (Path(__file__).parents[1] / "docs" / "TESTING_YOUR_KERNEL.md").read_text()
KERNEL, TESTS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "theirs.py").write_text(KERNEL)
    (tmp_path / "test_theirs.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["rooflama.testing.plugin"]\n')
    return tmp_path


def run(folder, *arguments):
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "smoke", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_their_kernel_keeps_every_law(folder):
    done = run(folder)
    assert done.returncode == 0, done.stdout
    assert f"{len(laws.attention_prefill)} passed" in done.stdout


def test_the_table_lists_the_laws():
    listed = re.findall(r"^\| `(\w+)` \| [a-z]", GUIDE, flags=re.MULTILINE)
    assert listed == [law.name for law in laws.attention_prefill]
    lines = [line for line in TESTS.splitlines() if line.strip()]
    assert len(lines) <= 15


@pytest.mark.parametrize(
    ("old", "new", "law"),
    [
        ("<= num_keys - num_queries + rows", "<= num_keys - num_queries + 1 + rows", "a_finite_future"),
        ("head // (num_heads // num_kv_heads)", "head % num_kv_heads", "equals_definition"),
    ],
)
def test_a_bug_in_their_kernel_is_found(folder, old, new, law):
    assert KERNEL.count(old) == 1
    (folder / "theirs.py").write_text(KERNEL.replace(old, new))
    (folder / "test_theirs.py").write_text(TESTS + "\nfrom hypothesis import Phase, settings\n"
        "settings.register_profile('found', max_examples=10, phases=[Phase.generate], derandomize=True)\n"
        "settings.load_profile('found')\n")  # fmt: skip
    done = run(folder, "-k", law)
    assert done.returncode == 1, done.stdout
    assert "FAILED" in done.stdout


def test_mutants_of_their_file_are_planted_and_judged(folder, monkeypatch, capsys):
    """The runs themselves, which take minutes, are replaced: a change of the mask survives."""
    seen = []

    def judged(runner, tests, file="", text="", first_only=True):
        seen.append((tests, file, text))
        return mutants.Outcome("SURVIVED" if not file or "seen = keys[None, :] <" in text else "killed", "", 0.0), []

    monkeypatch.chdir(folder)
    monkeypatch.setattr(mutants.Runner, "run", judged)
    status = mutants.main(["theirs.py", "--test", "test_theirs.py", "--generate", "5"])
    assert status in (0, 1)
    assert [tests for tests, _, _ in seen] == [["test_theirs.py"]] * 6
    assert len({text for _, file, text in seen if file == "theirs.py"}) == 5
    assert "score" in capsys.readouterr().out


def test_a_copy_holds_the_folder_and_the_mutant(folder):
    (folder / ".git").mkdir()
    runner = mutants.Runner(lambda tree: mutants.copy_folder(folder, tree), 1, 60.0, float("inf"))
    outcome, failed = runner.run(["check.py"], "check.py", "def test_it():\n    import theirs\n    assert 0\n")
    assert outcome.verdict == "killed"
    assert failed == ["FAILED check.py::test_it"]
    assert runner.run(["check.py"], "check.py", "def test_it():\n    import theirs\n")[0].verdict == "SURVIVED"


def test_a_sanitizer_needs_a_gpu_and_a_version(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="consan: it instruments compiled code, and there is no GPU"):
        plugin._sanitize("consan")
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    with pytest.raises(pytest.UsageError, match=r"fpsan: Triton 3\.7\.1 has none; 3\.8 does"):
        plugin._sanitize("fpsan")
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "")
    plugin._sanitize("consan")
    assert triton.knobs.compilation.instrumentation_mode == "consan"
