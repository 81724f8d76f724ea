"""The command line as a person meets it: a process, its output, its exit status."""

import os
import subprocess
import sys

import gguf
import pytest

from demo_oracle import checkpoint_path
from small_checkpoint import write_small


def rooflama(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["COLUMNS"] = "200"
    return subprocess.run(
        [sys.executable, "-m", "rooflama.cli", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def assert_one_line_error(result: subprocess.CompletedProcess, *fragments: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for fragment in ("error:", *fragments):
        assert fragment in lines[0]


def test_missing_file(tmp_path):
    assert_one_line_error(rooflama("run", str(tmp_path / "missing.gguf"), "Hello"), "missing.gguf")


@pytest.mark.parametrize("name", ["[/b]", "[red]", "[link=x]"])
def test_brackets_in_a_name_are_text(tmp_path, name):
    assert_one_line_error(rooflama("run", str(tmp_path / f"{name}.gguf"), "Hello"), f"{name}.gguf")


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_models_own_name_is_text(tmp_path, command):
    """Neither markup nor a terminal's escape codes come through from a file."""
    path = write_small(tmp_path / "small.gguf", {"general.name": "a[/b]\x1b[2J\x07c"})
    result = rooflama(command, str(path))
    assert result.returncode == 0, result.stderr
    assert r"a[/b]\x1b[2J\x07c" in result.stdout
    assert not {"\x1b", "\x07"} & set(result.stdout)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--sequences", "1" + "0" * 400), ("--context", "1" + "0" * 400), ("--limit", "1e30"), ("--device", "cuda:½")],
)
def test_what_no_plan_can_be_made_for(tmp_path, option, value):
    path = write_small(tmp_path / "small.gguf")
    assert_one_line_error(rooflama("plan", str(path), option, value), value[:1])


@pytest.mark.parametrize("arguments", [["plan"], ["check", "small.gguf", "--report"]])
def test_names_too_long_are_one_line(arguments):
    assert_one_line_error(rooflama(*arguments, "x" * 300), "File name too long")


@pytest.mark.demo_checkpoint
def test_truncated_file(tmp_path):
    short = tmp_path / "short.gguf"
    with open(checkpoint_path(), "rb") as whole:
        short.write_bytes(whole.read(5_000_000))
    assert_one_line_error(rooflama("run", str(short), "Hello"), "short.gguf")


def test_unknown_architecture(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_one_line_error(rooflama("run", str(path), "Hello"), "architecture 'mamba'", "llama")


@pytest.mark.demo_checkpoint
def test_empty_prompt():
    assert_one_line_error(rooflama("run", str(checkpoint_path()), ""), "empty prompt")


@pytest.mark.demo_checkpoint
def test_prompt_beyond_the_context():
    result = rooflama("run", str(checkpoint_path()), "word " * 200, "--max-context", "128")
    assert_one_line_error(result, "context of 128 tokens", "max_context")


@pytest.mark.demo_checkpoint
def test_run_streams_to_standard_output():
    result = rooflama("run", str(checkpoint_path()), "The capital of France is", "--max-new-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr


@pytest.mark.demo_checkpoint
def test_inspect_reads_the_header():
    result = rooflama("inspect", str(checkpoint_path()))
    assert result.returncode == 0, result.stderr
    for fact in ("GQA: 9 query heads on 3 key/value heads (group 3)", "Q4_1 210", "tied", "23,040 bytes a token"):
        assert fact in result.stdout


def test_env_names_the_backend():
    result = rooflama("env")
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout
    assert "NumPy definitions" in result.stdout or "compiled Triton" in result.stdout


@pytest.mark.parametrize("command", [["run", "hello"], ["chat"], ["plan"], ["inspect"]], ids=lambda command: command[0])
def test_rope_of_the_command_line(tmp_path, command):
    """Every command that loads or describes a model takes it, and refuses what describes no rotation."""
    path = str(write_small(tmp_path / "small.gguf"))
    name, *rest = command
    assert_one_line_error(rooflama(name, path, *rest, "--rope", "kind=warp"), "the kinds are default, linear, dynamic")
    if name == "inspect":
        described = rooflama(name, path, "--rope", "kind=yarn,factor=4,base=1e6")
        assert "yarn (factor 4" in described.stdout, described.stderr
