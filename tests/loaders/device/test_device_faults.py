"""Faults at the device boundary: each raises a typed error, and leaves nothing allocated that is not listed.

On a machine with a GPU, the tests run there.
"""

import gc
import os
import re
import resource
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from limits import SMALL_CHUNK
from rooflama.loaders.device import (
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DoubleFree,
    LeakWarning,
    UseAfterClose,
    open_device,
)
from rooflama.loaders.device import raw as device_raw
from rooflama.loaders.device.ledger import allocation_site
from rooflama.testing.strategies import DEVICE


@pytest.fixture
def fail_at(monkeypatch):
    """Make the n-th operation from now on raise; the returned list records every operation."""

    def arm(n, error):
        steps = []

        def before_operation(operation, label, nbytes):
            steps.append((operation, label, nbytes))
            if len(steps) == n + 1:
                raise error

        monkeypatch.setattr(device_raw, "before_operation", before_operation)
        return steps

    return arm


# What the driver says -> what it becomes.
DRIVER_SAYS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), DeviceOutOfMemory),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), DeviceOutOfMemory),
    (RuntimeError("CUDA error: out of memory"), DeviceOutOfMemory),
    (MemoryError(), DeviceOutOfMemory),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"), DeviceLost),
    (RuntimeError("HIP error: device lost"), DeviceLost),
    (torch.AcceleratorError(""), DeviceLost),
    (ValueError("nothing to do with the device"), ValueError),
    (KeyboardInterrupt(), KeyboardInterrupt),
]


def _load(device, arrays):
    """Upload like a loader: several tensors, then a cache."""
    with device.all_or_nothing():
        buffers = [device.upload(array, label=f"w.{i}") for i, array in enumerate(arrays)]
        buffers.append(device.allocate((64,), torch.float16, label="cache"))
        return buffers


@pytest.mark.parametrize(("error", "expected"), DRIVER_SAYS, ids=lambda value: getattr(value, "__name__", None))
def test_every_allocation_and_copy_may_fail_and_nothing_stays(small_chunks, fail_at, error, expected):
    arrays = [np.arange(n, dtype=np.uint8) % 251 for n in (10, 3 * SMALL_CHUNK, 1)]
    with open_device(DEVICE) as device:
        steps = fail_at(-2, error)
        for buffer in _load(device, arrays):
            buffer.close()
    total = len(steps)
    staging = int(DEVICE.type == "cuda")  # pinned memory, with the first copy
    assert total == 4 + staging + 1 + 3 + 1  # allocations, then the chunks of each copy
    for n in range(total):
        with open_device(DEVICE) as device:
            kept = device.allocate((8,), torch.uint8, label="made before")
            steps = fail_at(n, error)
            with pytest.raises(expected) as caught:
                _load(device, arrays)
            assert device.held_bytes == 8, "while the error and its traceback are still there"
            assert device.held() == (kept,)
            assert len(steps) == n + 1
            if isinstance(caught.value, DeviceError):
                assert caught.value.__cause__ is error
                assert repr(steps[-1][1]) in str(caught.value)
            fail_at(-2, error)
            if expected is DeviceLost:  # permanently, on this device
                with pytest.raises(DeviceLost, match="must answer"):
                    _load(device, arrays)
            else:
                assert len(_load(device, arrays)) == 4
    with open_device(DEVICE) as device:  # the process can still load
        assert len(_load(device, arrays)) == 4


def test_progress_that_raises_leaves_nothing(device, small_chunks):
    def interrupted(nbytes):
        raise KeyboardInterrupt

    for borrow in (False, True):
        with pytest.raises(KeyboardInterrupt):
            device.upload(np.zeros(3 * SMALL_CHUNK, dtype=np.uint8), label="x", borrow=borrow, progress=interrupted)
        assert device.held() == ()


def test_guard_translates_and_keeps_numbers(device):
    device.allocate((100,), torch.uint8, label="x")
    message = "prefill of 512 tokens: asked an unknown amount"
    with pytest.raises(DeviceOutOfMemory, match=message) as caught, device.guard("prefill of 512 tokens"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert caught.value.held == 100


def test_downloads_fail_with_typed_errors_too(device, fail_at):
    buffer = device.upload(np.zeros(4, dtype=np.uint8), label="x")
    fail_at(0, RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(DeviceLost, match=r"copying 'x' from the device: the driver said 'CUDA error: unspecified"):
        device.download(buffer)
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        device.allocate((1,), torch.uint8, label="y")
    device.close()  # closing works on a lost device
    assert buffer.closed


def test_loading_100_times_leaks_nothing():
    array = np.zeros(25_000, dtype=np.uint8)

    def load_and_close():
        with open_device(DEVICE) as device:
            for i in range(20):
                device.upload(array, label=f"w.{i}")
            device.allocate((2**14,), torch.uint8, label="cache").tensor.zero_()
            assert device.held_bytes == 20 * array.nbytes + 2**14
        return device.held_bytes

    for _ in range(5):
        load_and_close()
    gc.collect()
    allocated = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    tracemalloc.start()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        assert load_and_close() == 0
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 64 * 2**10, f"{grown} bytes of Python objects stay after 100 loads"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 16 * 2**10  # KiB; 100 loads are 50 MiB
    if DEVICE.type == "cuda":
        assert torch.cuda.memory_allocated() == allocated


def test_threads_share_a_device(device):
    def work():
        for i in range(50):
            device.upload(np.full(64, i, dtype=np.uint8), label="t").close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.held_bytes == 0


def test_a_device_dropped_with_buffers_is_reported(monkeypatch):
    open_device(DEVICE).allocate((10,), torch.uint8, label="forgotten")
    monkeypatch.setenv("ROOFLAMA_DEBUG", "1")
    with pytest.warns(LeakWarning, match=r"1 buffers, 10 bytes, still held on .*\n  forgotten: 10 bytes$"):
        gc.collect()


def test_each_of_several_devices_is_reported(monkeypatch):
    """Python shows a warning once per text."""
    monkeypatch.setenv("ROOFLAMA_DEBUG", "1")
    for _ in range(3):
        open_device(DEVICE).allocate((10,), torch.uint8, label="forgotten")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        gc.collect()
    assert len(caught) == 3


def test_a_failing_block_closes_what_its_own_thread_made_in_it():
    def fail_inside(device):
        with device.all_or_nothing():
            device.allocate((4,), torch.uint8, label="mine")
            thread = threading.Thread(target=lambda: device.allocate((4,), torch.uint8, label="another thread's"))
            thread.start()
            thread.join()
            raise ValueError("inner")

    def fail_after_an_inner_block(device):
        with device.all_or_nothing():
            with device.all_or_nothing():
                device.allocate((4,), torch.uint8, label="of the inner block, which went well")
            raise ValueError("outer")

    with open_device(DEVICE) as device:
        for failing in (fail_inside, fail_after_an_inner_block):
            with device.all_or_nothing(), pytest.raises(ValueError, match=r"inner|outer"):
                failing(device)
            assert [buffer.label for buffer in device.held()] == ["another thread's"]


def test_debug_names_the_line_that_allocates_and_the_users(monkeypatch):
    monkeypatch.setenv("ROOFLAMA_DEBUG", "1")
    scope = {"__name__": "rooflama.models.weights", "allocation_site": allocation_site}
    exec(compile("def upload():\n    return allocation_site()", "weights.py", "exec"), scope)
    assert re.fullmatch(r"weights.py:2 in upload, for .*test_device_faults.py:\d+ in test_debug.*", scope["upload"]())


@pytest.mark.parametrize("debug", [False, True])
def test_what_is_held_at_exit_is_reported_to_who_debugs(tmp_path, debug):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from rooflama.loaders.device import open_device

            def load():
                return device.allocate((3,), torch.float32, label="k_pages.0")

            device = open_device("cpu")
            buffer = load()
            closed = open_device("cpu")
            closed.allocate((3,), torch.float32, label="never named").close()
            """
        )
    )
    environment = {**os.environ, "ROOFLAMA_DEBUG": str(int(debug))}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=True)
    if not debug:
        assert run.stderr == ""
        return
    assert "LeakWarning: 1 buffers, 12 bytes, still held on cpu" in run.stderr
    assert f"k_pages.0: 12 bytes, made at {script}:6 in load" in run.stderr
    assert "never named" not in run.stderr


class Lifetimes(RuleBasedStateMachine):
    """After any sequence of allocations, closes and frees, the ledger equals a plain dictionary."""

    LIMIT = 1000
    buffers = Bundle("buffers")
    dead = Bundle("dead")

    def __init__(self):
        super().__init__()
        self.device = open_device(DEVICE, memory_limit=self.LIMIT)
        self.expected = {}

    @precondition(lambda self: sum(self.expected.values()) + 100 <= self.LIMIT)
    @rule(target=buffers, nbytes=st.integers(0, 100))
    def allocate(self, nbytes):
        buffer = self.device.allocate((nbytes,), torch.uint8, label="x")
        self.expected[buffer] = nbytes
        return buffer

    @rule(extra=st.integers(1, 50))
    def over_the_limit(self, extra):
        room = self.LIMIT - sum(self.expected.values())
        with pytest.raises(DeviceOutOfMemory):
            self.device.allocate((max(room, 0) + extra,), torch.uint8, label="x")

    @rule(target=dead, buffer=consumes(buffers), free=st.booleans())
    def end(self, buffer, free):
        if free:
            self.device.free(buffer)
        else:
            buffer.close()
        del self.expected[buffer]
        return buffer

    @rule(buffer=dead)
    def use_of_the_dead(self, buffer):
        buffer.close()
        with pytest.raises(DoubleFree):
            self.device.free(buffer)
        with pytest.raises(UseAfterClose):
            _ = buffer.tensor

    @invariant()
    def ledger_is_exact(self):
        assert self.device.held() == tuple(self.expected)
        assert self.device.held_bytes == sum(self.expected.values())

    def teardown(self):
        self.device.close()
        assert self.device.held_bytes == 0


TestLifetimes = Lifetimes.TestCase
