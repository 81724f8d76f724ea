"""The benchmark registry, as far as a CPU can run it, and what the committed rows cover."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

from rooflama.kernel_card import CARDS, MEASUREMENTS
from rooflama.kernels.launch import TABLE, configuration

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        module = importlib.import_module("cases")
        patch.setattr(module, "CUDA", "cpu")
        patch.setattr(module, "_copies", lambda num_bytes: 1)
        yield module


@pytest.mark.parametrize("group", ["attention_decode", "attention_prefill", "elementwise", "tables"])
def test_peers_compute_the_same(cases, numpy_backend, group):
    case = next(case for case in cases.CASES[group]() if len(case.implementations) > 1)
    ours, peer = (calls[0]() for calls in case.implementations.values())
    ours = (ours[0] if isinstance(ours, tuple) else ours).double().flatten()
    peer = peer.transpose(1, 2).double().flatten() if peer.dim() == 4 else peer.double().flatten()
    assert float((ours - peer).norm()) <= 0.01 * float(peer.norm()), case.label


@pytest.mark.parametrize("group", ["quantized_matmul", "rotary_and_pages"])
def test_cases_without_an_equal_peer_run(cases, numpy_backend, group):
    case = next(cases.CASES[group]())
    assert case.kernel in CARDS
    assert case.num_bytes > 0
    for calls in case.implementations.values():
        assert torch.isfinite(calls[0]()).all()


@pytest.mark.parametrize("kernel", sorted(TABLE.keys() - {"quantized_matmul"}))  # regimes are cases, not candidates
def test_the_tuner_tries_what_the_table_holds(cases, kernel):
    """Every kernel of the table has candidates with the keys of its rows, and a problem that states its facts."""
    tune = importlib.import_module("tune")
    problem = next(tune.problems(kernel, ["Q4_K"], [1]))
    chosen = configuration(kernel, torch.device("cpu"), **problem.facts)
    candidates = list(tune.CANDIDATES[kernel](problem.facts))
    assert len(candidates) > 2
    for candidate in candidates:
        assert set(candidate) == set(chosen)


UNMEASURED = {"penalties"}  # written when no GPU was at hand; benchmarks/cases.py has no case for it yet


def test_every_kernel_has_a_committed_measurement():
    with MEASUREMENTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(CARDS) - {row["kernel"] for row in rows} == UNMEASURED
    assert all(float(row["us_p50"]) > 0 and row["gpu"] and row["commit"] for row in rows)


def test_a_run_of_one_group_keeps_the_rows_of_the_others(cases, monkeypatch, tmp_path):
    run, timing = (importlib.import_module(name) for name in ("run", "timing"))
    table = tmp_path / "kernels.csv"
    clock = {"ours": 1.0, "peer": 2.0}

    def case(kernel, label, *names):
        return cases.Case(kernel, label, 1, 1, {name: [name] for name in names})

    def run_groups(*groups):
        monkeypatch.setattr(sys, "argv", ["run.py", *groups, "--out", str(table)])
        run.main()
        with table.open(newline="") as file:
            return [(r["kernel"], r["case"], r["implementation"], float(r["us_p50"])) for r in csv.DictReader(file)]

    groups = {
        "a": lambda: [case("norm", "first", "ours", "peer"), case("norm", "second", "ours")],
        "b": lambda: [case("norm", "third", "ours")],
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "CASES", groups)
    monkeypatch.setattr(run, "ceilings", lambda: (1e12, 1e15))
    monkeypatch.setattr(run, "provenance", lambda: {"gpu": "none", "commit": "none"})
    monkeypatch.setattr(run, "measure", lambda calls: timing.Measured(*[clock[calls[0]]] * 3))
    assert run_groups("a") == [
        ("norm", "first", "ours", 1.0),
        ("norm", "first", "peer", 2.0),
        ("norm", "second", "ours", 1.0),
    ]
    everything = run_groups()
    assert run_groups("b") == everything

    clock["ours"] = 3.0
    groups["a"] = lambda: [case("norm", "first", "ours"), case("norm", "fourth", "ours")]
    assert run_groups("a") == [
        ("norm", "first", "ours", 3.0),
        ("norm", "second", "ours", 1.0),
        ("norm", "third", "ours", 1.0),
        ("norm", "fourth", "ours", 3.0),
    ]
    assert {row[1] for row in run_groups()} == {"first", "third", "fourth"}
