"""The command line: what it prints, and its exit status."""

import json
import math
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import pytest

import rooflama as package
from command_line import Result, rooflama
from demo_oracle import checkpoint_path
from rooflama.kernel_card import kernel_card
from small_checkpoint import shapes, write_small


def assert_one_line_error(result: Result, *fragments: str) -> None:
    assert result.status == 2, result.stdout + result.stderr
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
    """Markup and escape codes in a file's metadata are printed as text."""
    path = write_small(tmp_path / "small.gguf", {"general.name": "a[/b]\x1b[2J\x07c"})
    result = rooflama(command, str(path))
    assert result.status == 0, result.stderr
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
@pytest.mark.usefixtures("numpy_backend")
def test_run_streams_to_standard_output():
    result = rooflama("run", str(checkpoint_path()), "The capital of France is", "--max-new-tokens", "8")
    assert result.status == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr


@pytest.mark.demo_checkpoint
def test_inspect_reads_the_header():
    result = rooflama("inspect", str(checkpoint_path()))
    assert result.status == 0, result.stderr
    for fact in ("GQA: 9 query heads on 3 key/value heads (group 3)", "Q4_1 210", "tied", "23,040 bytes per token"):
        assert fact in result.stdout


def test_env_names_the_backend():
    result = rooflama("env")
    assert result.status == 0, result.stderr
    backend = next(line for line in result.stdout.splitlines() if line.startswith("backend"))
    assert any(words in backend for words in ("NumPy definitions", "compiled Triton", "Triton's interpreter"))


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys, rooflama.cli as cli; sys.argv[1:] = [{!r}]\ntry: cli.main()\nfinally: print(*sys.modules)"
    for option, expected in (("--help", "Llama-family models"), ("--version", f"rooflama {package.__version__}")):
        command = [sys.executable, "-c", code.format(option)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        *said, modules = result.stdout.splitlines()
        assert expected in "\n".join(said)
        assert not {"torch", "numpy", "triton"} & set(modules.split())


def test_the_folder_above_a_clone(tmp_path):
    """There a clone named rooflama hides the installed package, and must work in its place."""
    root = Path(__file__).parents[1]
    (tmp_path / "rooflama").symlink_to(root)
    code = "import rooflama, rooflama.json_text; from importlib.util import find_spec; print(rooflama.__file__)"
    code += "; print(*dir(rooflama)); print(*(find_spec(f'rooflama.{room}').origin for room in rooflama._ROOMS))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    file, names, rooms = result.stdout.splitlines()
    assert file == str(tmp_path / "rooflama" / "__init__.py")
    assert set(package.__all__) <= set(names.split())
    assert rooms.split() == [str(tmp_path / "rooflama" / room / "__init__.py") for room in package._ROOMS]


def test_every_public_name_is_there():
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert package.kernels.rms_norm is not None
    assert {"integrations", "testing"} <= {name for name in dir(package) if getattr(package, name) is not None}
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        package.lode  # noqa: B018


def test_json_of_inspect(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    result = rooflama("inspect", str(path), "--json")
    assert (result.status, result.stderr) == (0, "")
    facts = json.loads(result.stdout, parse_constant=pytest.fail)
    assert facts["config"]["num_kv_heads"] == 2
    assert facts["tensors"]["Q8_0"]["count"] == 1
    assert facts["parameters"] == sum(math.prod(shape) for shape in shapes().values())


def test_json_of_env():
    facts = json.loads(rooflama("env", "--json").stdout)
    assert facts["rooflama"] == metadata.version("rooflama")
    assert "backend" in facts


def test_json_of_a_kernel():
    facts = json.loads(rooflama("kernel", "rms_norm", "--json").stdout, parse_constant=pytest.fail)
    assert facts["kernel"] == "norm"
    assert [function["name"] for function in facts["functions"]] == ["rms_norm", "add_rms_norm"]
    assert all(facts[part] for part in ("laws", "compiled", "measured"))


def test_a_kernel_into_a_pipe_is_markdown():
    assert rooflama("kernel", "norm").stdout == kernel_card("norm").markdown()


def test_tables_into_a_pipe_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "word " * 50 + "end"
    result = rooflama("inspect", str(write_small(tmp_path / "small.gguf", {"general.name": name})))
    assert f"{name} (architecture llama)" in result.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_ends_a_table(tmp_path, encoding):
    """A character that the encoding lacks is printed as a question mark, or escaped in errors."""
    path = write_small(tmp_path / "small.gguf", {"general.name": "naïve 🙂 \u4e16"})
    shown = "naïve 🙂 \u4e16".encode(encoding, "replace").decode(encoding)
    for command in ("inspect", "plan"):
        result = rooflama(command, str(path), encoding=encoding)
        assert result.status == 0, result.stderr
        assert shown in result.stdout
    for command in (["kernel", "norm"], ["env"]):
        assert rooflama(*command, encoding=encoding).stdout
    assert_one_line_error(rooflama("inspect", "🙂.gguf", encoding=encoding), ".gguf")
