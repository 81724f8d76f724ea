"""``rooflama warm``: kernels compiled from a header alone, and found by the next process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rooflama as package
from command_line import rooflama
from rooflama import warming
from rooflama.kernels import INTERPRETED
from rooflama.models import ArgumentError
from rooflama.warming import Compiling, parse_target
from small_checkpoint import write_small


def warm_without_gpu(path: Path, cache: Path, *options: str) -> str:
    """What the command prints in a process of its own, since this one may have its kernels interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "rooflama", "warm", str(path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    options = ("--target", "sm_90", "--max-context", "128")
    printed = [warm_without_gpu(path, tmp_path / "cache", *options) for _ in range(2)]
    (kernels, first), (again, second) = (
        re.findall(r"\d+(?= kernels| compiled)", " ".join(text.split())) for text in printed
    )
    assert kernels == first == again
    assert second == "0"
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == int(kernels) > 10
    assert str(tmp_path / "cache") in "".join(printed[0].split())  # lines break where COLUMNS says


def test_a_cpu_has_nothing_to_compile(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    done = rooflama("warm", str(path), "--device", "cpu")
    assert (done.status, done.stderr) == (0, "")
    assert "nothing to compile: the CPU runs the NumPy definitions, or Triton's interpreter" in " ".join(
        done.stdout.split()
    )
    assert package.warm(path, device="cpu").gpu is None


def test_targets(monkeypatch):
    monkeypatch.setattr(warming, "INTERPRETED", False)
    assert (parse_target("sm_90").backend, parse_target("sm_90").arch, parse_target("sm_120").arch) == ("cuda", 90, 120)
    assert [parse_target(name).warp_size for name in ("sm_80", "gfx942", "gfx1100")] == [32, 64, 32]
    for name in ("sm90", "sm_9", "sm_90a", "h100", "gfx", ""):
        with pytest.raises(ArgumentError, match="a target is sm_"):
            parse_target(name)


@pytest.mark.skipif(not INTERPRETED, reason="Triton is compiled")
def test_the_interpreter_compiles_nothing(tmp_path):
    done = rooflama("warm", str(write_small(tmp_path / "small.gguf")), "--target", "sm_90")
    assert done.status == 2
    assert "the interpreter compiles nothing. Unset TRITON_INTERPRET" in " ".join(done.stderr.split())


def test_what_cannot_be_compiled_ahead_is_a_warning(monkeypatch):
    """A family of the user's may read values of its tensors, which a rehearsal does not have."""

    def fail(*_, **__):
        raise RuntimeError("no values")

    monkeypatch.setattr(Compiling, "_compile", fail)
    compiling = Compiling(None, None, torch.device("cpu"), num_tokens=1)
    with pytest.warns(UserWarning, match="compiled when they are first used, not ahead: no values"):
        compiling.wait(lambda done, total: None)


def test_load_compiles_a_first_answer_beside_the_upload_and_waits_for_both(monkeypatch, tmp_path):
    events = []

    def rehearse(*_, **options):
        events.append(options["first_answer"])
        return ["a launch"] * 3

    def compile_launches(launches, device, progress):
        progress(2, len(launches))
        events.append(device)

    monkeypatch.setattr(warming, "rehearse", rehearse)
    monkeypatch.setattr(warming, "compile_launches", compile_launches)
    monkeypatch.setattr(warming, "gpu_of", lambda device: None)
    monkeypatch.setattr("rooflama.loading.replays", lambda device: True)
    with package.load(write_small(tmp_path / "small.gguf"), device="cpu", max_context=64, progress=False):
        assert events == [True, torch.device("cpu")]
