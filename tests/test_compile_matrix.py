"""A fast subset of the compile matrix: each kernel once for an Nvidia and an AMD target, with no GPU; and its table."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def compile_matrix(*options):
    """Run the script in a process of its own, since this one has its kernels decorated for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_matrix.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_every_kernel_compiles():
    done = compile_matrix("--fast")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "v_mfma" in done.stdout
    assert "wgmma.mma_async" in done.stdout


def test_a_kernel_that_no_call_reaches_is_named():
    done = compile_matrix("--models", "none", "--targets", "sm_90", "--kernels", "^_rms_norm_kernel$")
    assert done.returncode == 1
    assert "_rms_norm_kernel: no call in benchmarks/registry reaches it" in done.stderr


def test_the_table_is_of_todays_launches():
    """A launcher that chooses another tile, or a kernel with another argument, wants `make compile-matrix`."""
    done = compile_matrix("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("compile_table")


def row(table, kernel, options="num_warps=4", registers=32, target="sm_90"):
    return table.Row(kernel, target, "a call", "*bf16:16 i32", options, registers, 0, 0, "", "", "3.7.1")


def test_kernels_compiled_by_themselves_replace_their_rows_alone(table, tmp_path):
    path = tmp_path / "table.csv"
    table.write([row(table, "_rope_kernel"), row(table, "_norm_kernel"), row(table, "_norm_kernel", "a=1")], path, "")
    before = path.read_text()
    table.write([], path, "^_gone_kernel$")
    assert path.read_text() == before
    table.write([row(table, "_norm_kernel", registers=64)], path, "^_norm")
    assert [(line["kernel"], line["registers"], line["triton"]) for line in table.read_rows(path)] == [
        ("_norm_kernel", "64", "3.7.1"),
        ("_rope_kernel", "32", "3.7.1"),
    ]
    table.write([row(table, "_new_kernel")], path, "")
    assert [line["kernel"] for line in table.read_rows(path)] == ["_new_kernel"]


def test_rows_that_differ_in_options_alone_look_different(table, tmp_path):
    path = tmp_path / "table.csv"
    table.write([row(table, "_norm_kernel"), row(table, "_norm_kernel", "num_warps=2")], path, "")
    written = table.launches_in(path)
    launched = {("_norm_kernel", "sm_90", "a call", "*bf16:16 i32", f"num_warps={n}") for n in (4, 8)}
    new, old = table.differences(written, launched)
    assert new.split("\n") == ["not in the table: _norm_kernel sm_90 a call", "    *bf16:16 i32", "    num_warps=8"]
    assert old.split("\n") == ["launched no more: _norm_kernel sm_90 a call", "    *bf16:16 i32", "    num_warps=2"]
    assert table.differences(written, written) == []
