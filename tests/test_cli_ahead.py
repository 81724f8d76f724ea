"""What a first kernel needs, made while torch is imported."""

import ctypes

import pytest
from triton.runtime import cache

from rooflama.cli import ahead


@pytest.fixture
def calls(monkeypatch):
    """What is called of the driver; threads run at once."""
    made = []

    class Driver:
        def __init__(self, name):
            made.append(name)

        def cuInit(self, flags):
            made.append(("cuInit", flags))

        def cuDevicePrimaryCtxRetain(self, into, number):
            made.append(("retain", number))

    class Thread:
        def __init__(self, *, target, args, daemon):
            assert daemon
            self.start = lambda: target(*args)

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(cache, "triton_key", lambda: made.append("Triton's key"))
    monkeypatch.setattr(ahead.threading, "Thread", Thread)
    return made


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_context_of_the_named_gpu_is_made_and_triton_hashed(calls, device, number):
    ahead.begin(device)
    assert calls == ["libcuda.so.1", ("cuInit", 0), ("retain", number), "Triton's key"]


@pytest.mark.parametrize("device", ["cpu", "hip:0", "cuda:", "cuda:x", "tpu"])
def test_nothing_is_made_without_a_gpu_of_nvidias(calls, device):
    ahead.begin(device)
    assert calls == []


def test_ranks_make_their_own(calls, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    ahead.begin("auto")
    assert calls == []


def test_a_machine_without_a_driver_is_no_error(calls, monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    ahead.begin("auto")
