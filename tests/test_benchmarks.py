"""The benchmark registry, as far as a CPU can run it, and what the committed rows cover."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

from rooflama.kernel_card import CARDS, MEASUREMENTS

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


def test_every_kernel_has_a_committed_measurement():
    with MEASUREMENTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(CARDS) <= {row["kernel"] for row in rows}
    assert all(float(row["us_p50"]) > 0 and row["gpu"] and row["commit"] for row in rows)
