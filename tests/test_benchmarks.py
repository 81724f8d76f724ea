"""The benchmark registry, as far as a CPU can run it, and what the committed rows cover."""

import csv
import importlib
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rooflama
from rooflama.kernel_card import CARDS, MEASUREMENTS
from rooflama.kernels.kernel import KERNELS
from rooflama.kernels.launch import TABLE, configuration

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        module = importlib.import_module("cases")
        patch.setattr(module, "CUDA", "cpu")
        patch.setattr(module, "copies", lambda num_bytes: 1)
        yield module


@pytest.fixture(scope="module")
def measured(cases):
    return importlib.import_module("registry").MEASURED


@pytest.mark.parametrize("kernel", ["attention_decode", "attention_prefill", "norm", "mlp", "sampling"])
def test_peers_compute_the_same(measured, numpy_backend, kernel):
    case = next(case for case in measured[kernel]() if len(case.implementations) > 1)
    ours, peer = (calls[0]() for calls in case.implementations.values())
    ours = (ours[0] if isinstance(ours, tuple) else ours).double().flatten()
    peer = peer.transpose(1, 2).double().flatten() if peer.dim() == 4 else peer.double().flatten()
    assert float((ours - peer).norm()) <= 0.01 * float(peer.norm()), case.label


@pytest.mark.parametrize("kernel", CARDS)
def test_the_first_case_of_each_kernel_runs(measured, numpy_backend, kernel):
    case = next(measured[kernel]())
    assert case.num_bytes > 0
    for calls in case.implementations.values():
        result = calls[0]()
        for tensor in result if isinstance(result, tuple) else () if result is None else (result,):
            assert torch.isfinite(tensor).all()


def test_the_benchmark_of_the_engine_runs(cases, numpy_backend, monkeypatch, capsys):
    benchmark = importlib.import_module("engine")
    monkeypatch.setattr(sys, "argv", ["engine.py", "--small"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("ratio", "between_us", "work_saved", "pages_saved", "after_140_ms"))


def test_each_file_of_the_registry_is_a_kernels(measured):
    assert set(measured) == set(CARDS)


def test_every_kernel_is_measured(cases, measured, monkeypatch):
    """Tensors without contents; ``one_shot_sum`` is measured by tensor_parallel.py, on two GPUs."""
    monkeypatch.setattr(cases, "CUDA", "meta")
    called = set()
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(rooflama.swap(**{name: lambda *args, name=name, **kwargs: called.add(name)}))
        for kernel in measured:
            for case in measured[kernel]():
                for name in case.implementations.keys() & {"rooflama"}:
                    case.implementations[name][0]()
    assert called == KERNELS.keys() - {"one_shot_sum"}


def test_the_benchmark_of_long_contexts_runs(cases, numpy_backend, monkeypatch, tmp_path):
    benchmark, out = importlib.import_module("long_context"), tmp_path / "long_context.csv"
    monkeypatch.setattr(sys, "argv", ["long_context.py", "--small", "--out", str(out)])
    assert benchmark.main() == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], int(row["depth"])) for row in rows] == [
        *(("chunk", depth) for depth in (64, 128, 192, 256)),
        *(("token", depth) for depth in (32, 256)),
    ]
    assert all(float(row["ms"]) > 0 for row in rows)


def test_the_least_time_of_a_chunk_and_of_a_token(cases):
    """By hand for one layer with one head of 2: tokens 3 and 4 see 3 and 4 keys; 10 weights; a token is 5 bytes."""
    benchmark = importlib.import_module("long_context")
    shape = SimpleNamespace(num_heads=1, head_dim=2, num_layers=1)
    least = benchmark.Least(shape, 1e3, 1e3, layer_weights=10, step_bytes=100, token_bytes=5)
    assert least.chunk(depth=4, count=2) == 2 * 2 * 10 + (3 + 4) * 4 * 2
    assert least.token(depth=4) == 100 + 4 * 5


REGIMES = {"all_reduce", "quantized_matmul"}  # rows that choose a way are measured as cases, not as candidates


@pytest.mark.parametrize("kernel", sorted(TABLE.keys() - REGIMES))
def test_the_tuner_tries_what_the_table_holds(cases, kernel):
    """Every kernel of the table has candidates with the keys of its rows, and a problem that states its facts."""
    tune = importlib.import_module("tune")
    problem = next(tune.problems(kernel, ["Q4_K"], [1]))
    chosen = configuration(kernel, torch.device("cpu"), **problem.facts)
    candidates = list(tune.CANDIDATES[kernel](problem.facts))
    assert len(candidates) > 2
    for candidate in candidates:
        assert set(candidate) == set(chosen)


def test_committed_measurements_are_of_todays_kernels():
    with MEASUREMENTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} <= set(CARDS)
    assert all(float(row["us_p50"]) > 0 and row["gpu"] and row["commit"] for row in rows)


def test_a_run_of_one_kernel_keeps_the_rows_of_the_others(cases, monkeypatch, tmp_path):
    run, timing = (importlib.import_module(name) for name in ("run", "timing"))
    table = tmp_path / "kernels.csv"
    clock = {"ours": 1.0, "peer": 2.0}

    def case(label, *names):
        return cases.Case(label, 1, 1, {name: [name] for name in names})

    def run_kernels(*options):
        monkeypatch.setattr(sys, "argv", ["run.py", *options, "--out", str(table)])
        run.main()
        with table.open(newline="") as file:
            return [(r["kernel"], r["case"], r["implementation"], float(r["us_p50"])) for r in csv.DictReader(file)]

    registry = {
        "a": lambda: [case("first", "ours", "peer"), case("second", "ours")],
        "b": lambda: [case("third", "ours")],
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "MEASURED", registry)
    monkeypatch.setattr(run, "ceilings", lambda: (1e12, 1e15))
    monkeypatch.setattr(run, "provenance", lambda: {"gpu": "none", "commit": "none"})
    monkeypatch.setattr(run, "measure", lambda calls: timing.Measured(*[clock[calls[0]]] * 3))
    assert run_kernels("a") == [
        ("a", "first", "ours", 1.0),
        ("a", "first", "peer", 2.0),
        ("a", "second", "ours", 1.0),
    ]
    everything = run_kernels()
    assert run_kernels("b") == everything

    clock["ours"] = 3.0
    registry["a"] = lambda: [case("first", "ours"), case("fourth", "ours")]
    assert run_kernels("a") == [
        ("a", "first", "ours", 3.0),
        ("a", "second", "ours", 1.0),
        ("b", "third", "ours", 1.0),
        ("a", "fourth", "ours", 3.0),
    ]
    assert {row[1] for row in run_kernels()} == {"first", "third", "fourth"}

    clock["ours"] = 4.0
    assert run_kernels("--only", "^f") == [
        ("a", "first", "ours", 4.0),
        ("a", "fourth", "ours", 4.0),
        ("b", "third", "ours", 3.0),
    ]


def test_a_call_is_replayed_from_the_second_time_on(cases):
    """Every kernel of overhead.py, with launches that do nothing; its body runs once."""
    overhead = importlib.import_module("overhead")
    with ExitStack() as stack, torch.inference_mode():
        overhead.without_a_gpu(stack)
        for name, call in overhead.calls("cpu").items():
            if name in KERNELS:
                stack.callback(KERNELS[name].forget)
                KERNELS[name].forget()
                call()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(KERNELS[name], "body", None)
                    call()


def test_kv_quality_of_known_distributions(cases):
    """One token with equal distributions, and one with p = (3/4, 1/4) and q = (1/5, 4/5)."""
    p, q = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 4.0]]).log()
    unused = torch.zeros(1, 2)  # no token follows the last
    figures = importlib.import_module("kv_quality").figures
    got = figures([0, 1, 1], torch.cat([p, p, unused]), torch.cat([p + 7, q, unused]))
    kl = 3 / 4 * math.log(3 / 4 * 5) + 1 / 4 * math.log(1 / 4 * 5 / 4)
    assert got == pytest.approx({"perplexity": (1 / 4 * 4 / 5) ** -0.5, "kl_mean": kl / 2, "kl_max": kl, "top1": 0.5})


@pytest.mark.demo_checkpoint
def test_kv_quality_runs(cases, numpy_backend, monkeypatch):
    quality = importlib.import_module("kv_quality")
    monkeypatch.setattr(quality, "CASES", quality.CASES[:2])
    own, int8 = quality.measure(quality.TEXT.read_text(), 200)
    assert [float(own[name]) for name in ("kl_mean", "kl_max", "top1")] == [0, 0, 1]
    assert int8["pages"] == "int8"
    assert 0 < float(int8["kl_mean"]) < float(int8["kl_max"]) < 1
    assert float(int8["perplexity"]) == pytest.approx(float(own["perplexity"]), rel=0.02)


def test_the_guide_has_the_committed_figures_of_kv_quality():
    guide = (FOLDER.parent / "docs" / "LOADING_EXAMPLES.md").read_text().replace("`", "")
    with (FOLDER / "results" / "kv_quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["pages"] for row in rows} >= {"int8", "fp8"}
    for row in rows:
        perplexity, mean, most, same = (float(row[name]) for name in ("perplexity", "kl_mean", "kl_max", "top1"))
        cells = [row["pages"], row["activations"], f"{perplexity:.2f}", f"{mean:.4f}", f"{most:.2f}", f"{same:.1%}"]
        assert f"| {' | '.join(cells)} |" in guide
