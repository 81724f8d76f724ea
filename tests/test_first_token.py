"""From the start of a process to its first token: what it imports, and the benchmark that times it."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from small_checkpoint import write_small
from tiny_checkpoints import write_case

PROGRAM = """
import sys, rooflama
from rooflama.kernels.gpu import GPUTarget
from rooflama.loaders.opening import open_headers
from rooflama.models import CheckpointReader
from rooflama.models.serving.rehearsal import rehearse
from rooflama.planning import adapter_of

running, *planned = sys.argv[1:]
for path in planned:
    for kv_dtype in ("auto", "int8"):
        plan = rooflama.plan_memory(path, device="cuda", dtype="float16", kv_dtype=kv_dtype)
        with open_headers(path) as checkpoint:
            reader, adapter = CheckpointReader(checkpoint), adapter_of(checkpoint)
            adapter.read_config(reader)
            assert rehearse(reader, plan.config, adapter, plan, GPUTarget("cuda", 90, 32))
with rooflama.load(running, progress=False) as model:
    model.generate("a", max_new_tokens=1)
print(*sys.modules)
"""


def test_the_first_token_imports_no_compiler_of_torch(tmp_path):
    """torch._dynamo takes a second to import. Some operators on the meta device would, in a plan or a rehearsal."""
    names = ("llama-biases", "qwen2-fused-qkv", "qwen3", "phi3-128k")
    paths = [write_small(tmp_path / "small.gguf"), *(write_case(name, tmp_path, "gguf") for name in names)]
    paths.append(write_case("llama-dynamic", tmp_path, "safetensors"))
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "rooflama.models" in result.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(result.stdout.split())


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("first_token")


def test_a_cold_process_finds_no_compiled_kernel_and_a_warm_one_finds_those_of_the_cold(
    benchmark, monkeypatch, tmp_path
):
    found = []

    def compile_into(model, cache):
        compiled = Path(cache) / "kernel"
        found.append(compiled.exists())
        compiled.touch()
        return benchmark.Sample(float(len(found)), 0.5)

    monkeypatch.setattr(benchmark, "sample", compile_into)
    table = tmp_path / "first_token.csv"
    monkeypatch.setattr(sys, "argv", ["first_token.py", "model.gguf", "--rounds", "3", "--out", str(table)])
    benchmark.main()
    assert found == [False, True] * 3
    with table.open(newline="") as file:
        cold, warm = csv.DictReader(file)
    assert (cold["cache"], cold["first_token_s"], cold["fastest_s"], cold["slowest_s"]) == (
        "cold",
        "3.00",
        "1.00",
        "5.00",
    )
    assert (warm["cache"], warm["first_token_s"], warm["processor_s"]) == ("warm", "4.00", "0.50")
    assert {"gpu", "torch", "triton", "commit", "date"} < set(warm)


def test_a_sample_times_a_process_and_reports_its_error(benchmark, monkeypatch, tmp_path):
    (tmp_path / "rooflama").mkdir()
    (tmp_path / "rooflama" / "__init__.py").write_text("raise ImportError('not the package')")
    monkeypatch.chdir(tmp_path)
    taken = benchmark.sample(str(write_small(tmp_path / "small.gguf")), str(tmp_path / "cache"))
    assert 0 < taken.first_token_s < 120
    assert taken.processor_s > 0
    with pytest.raises(SystemExit, match=r"missing\.gguf"):
        benchmark.sample(str(tmp_path / "missing.gguf"), str(tmp_path / "cache"))
