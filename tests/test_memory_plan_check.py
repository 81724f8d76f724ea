"""The benchmark that holds the memory plan against a GPU, as far as a CPU can run it."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rooflama.kernels import use_backend
from rooflama.loaders.device import open_device

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory_plan_check.py"
FIGURES = {
    "planned_allocated": 99 * 2**20,
    "peak_allocated": 100 * 2**20,
    "planned_reserved": 130 * 2**20,
    "peak_reserved": 120 * 2**20,
    "planned_total": 610 * 2**20,
    "driver_used": 600 * 2**20,
    "outside_torch": 480 * 2**20,
}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_plan_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_case_holds_what_was_planned(benchmark, monkeypatch):
    """Random weights are allocated as loading allocates them. Running them is the GPU's part."""
    requests, calls = [], []
    monkeypatch.setattr(
        benchmark.TokenEngine, "advance", lambda engine, sequence, until: requests.append(sequence.request)
    )
    with use_backend("triton"), open_device("cpu") as device:
        plan = benchmark.run_case("SmolLM2-135M", 1024, "int8", device, lambda: calls.append(1))
        assert len(calls) == 1
        tables = {line.name: line.nbytes for line in plan.lines}["rotary tables"]
        assert device.held_bytes == plan.bytes_of("weights", "keys and values") + tables
        assert [b.nbytes for b in device.held()][: len(plan.weights.allocations)] == list(plan.weights.allocations)
        assert all(torch.isfinite(b.tensor.float()).all() for b in device.held()[:20])
    *short, longest = requests[::2]  # each advances twice
    assert len(longest.prompt) + longest.max_new_tokens == 1024
    assert {len(request.prompt) for request in short} == {len(longest.prompt) - 1}


def test_weights_are_those_of_the_demo_checkpoint(benchmark):
    tensors = benchmark.ShapesOnly(benchmark.config_of("SmolLM2-135M")).tensors.values()
    assert {kind: sum(t.nbytes for t in tensors if t.ggml_type == kind) for kind in ("Q4_1", "Q8_0", "F32")} == {
        "Q4_1": 66355200,
        "Q8_0": 30081024,
        "F32": 140544,
    }


def test_rows_say_how_far_off(benchmark):
    row = benchmark.as_row("tiny", 1024, "int8", FIGURES)
    assert row["allocated_error"] == "-0.0100"
    assert row["total_error"] == "+0.0167"
    assert row["outside_torch_mib"] == "480.0"
    assert benchmark.within(row)
    assert not benchmark.within(benchmark.as_row("tiny", 1024, "int8", {**FIGURES, "planned_total": 613 * 2**20}))
    assert not benchmark.within(benchmark.as_row("tiny", 1024, "int8", {**FIGURES, "planned_allocated": 97 * 2**20}))


def test_the_driver_is_asked_about_the_gpu_that_torch_uses(benchmark, monkeypatch):
    properties = {0: SimpleNamespace(uuid="ffc79498-8ff3-c2dc-3b0d-fafd804516ae")}
    asked = []

    def run(query, **_):
        asked.extend(query)
        return SimpleNamespace(stdout="600\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.driver_used(benchmark.gpu_id()) == 600 * 2**20
    assert "--id=GPU-ffc79498-8ff3-c2dc-3b0d-fafd804516ae" in asked
