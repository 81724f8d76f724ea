"""A fast subset of the compile matrix: each kernel once for an Nvidia and an AMD target, with no GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compile_matrix(*options):
    """In a process of its own: this one has its kernels decorated for the interpreter."""
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
    assert "_rms_norm_kernel: no call in model_calls reaches it" in done.stderr


def test_the_table_is_of_todays_launches():
    """A launcher that chooses another tile, or a kernel with another argument, wants `make compile-matrix`."""
    done = compile_matrix("--check")
    assert done.returncode == 0, done.stdout + done.stderr
