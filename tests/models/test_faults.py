"""Every allocation and every copy fails once, in turn: a typed error, nothing held, and the next load works."""

import gc
import os
import sys
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median_low

import pytest
import torch

import rooflama
from failing import Failing
from rooflama.kernels import use_backend
from rooflama.loaders.device import Device, DeviceOutOfMemory
from rooflama.loaders.device import raw as device_raw
from small_checkpoint import write_small

PROMPT = "ab ab ab"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("faults") / "small.gguf")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def load(path, request):
    """Loads on the CPU, where the kernels are their definitions; and on a GPU, where decoding captures a graph."""
    with use_backend("numpy") if request.param == "cpu" else nullcontext():
        yield lambda: rooflama.load(path, device=request.param, max_context=64, progress=False)


@contextmanager
def failing_boundary(monkeypatch, fail_at):
    """The n-th raw step of the device boundary fails; yields the counter."""
    counter = {"steps": 0}

    def before_operation(operation, label, nbytes):
        counter["steps"] += 1
        if counter["steps"] == fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(device_raw, "before_operation", before_operation)
        yield counter


@pytest.mark.parametrize(("copies", "least"), [(False, 8), (True, 40)], ids=["weights borrowed", "weights copied"])
def test_load_fails_clean_at_every_step(load, monkeypatch, copies, least):
    """As the CPU loads, and as a GPU does: there each weight is an allocation and a copy of its own."""
    if copies:
        upload = Device.upload
        monkeypatch.setattr(Device, "upload", lambda *args, **options: upload(*args, **options | {"borrow": False}))
    with failing_boundary(monkeypatch, 0) as counter, load() as model:
        expected = model.generate(PROMPT, max_new_tokens=3).token_ids
    assert counter["steps"] >= least
    opened = []
    original = rooflama.loading.open_device
    monkeypatch.setattr(rooflama.loading, "open_device", lambda *a, **k: opened.append(original(*a, **k)) or opened[-1])
    for step in range(1, counter["steps"] + 1):
        with failing_boundary(monkeypatch, step), pytest.raises(DeviceOutOfMemory):
            load()
        gc.collect()  # the error's traceback held the frames of the failed load
        assert opened[-1].held_bytes == 0
        assert opened[-1].held() == ()
    with load() as model:
        assert model.generate(PROMPT, max_new_tokens=3).token_ids == expected


@pytest.mark.parametrize("work", ["prefill", "generate"])
def test_passes_fail_clean_at_every_step(load, work):
    def run(model):
        if work == "prefill":
            return model.logits(model.tokenizer.encode(PROMPT)).tolist()
        return model.generate([PROMPT, "ab"], max_new_tokens=3)[0].token_ids

    with load() as model:
        expected = run(model)
        held, free = model.device.held_bytes, model.runner.cache.pool.num_free
        captured = model.runner._captured
        run(model)  # on a GPU, captures the passes; the first capture of a process makes tensors of its own
        captured._graphs.update(dict.fromkeys(captured._graphs))  # to be captured again
        with Failing(0) as counting:
            run(model)
        assert counting.count > 10
        for step in range(1, counting.count + 1):
            captured._graphs.update(dict.fromkeys(captured._graphs))
            with Failing(step), pytest.raises(DeviceOutOfMemory, match=r"^(logits|generation|capturing a CUDA graph)"):
                run(model)
            assert model.device.held_bytes == held
            assert model.runner.cache.pool.num_free == free
        assert run(model) == expected


LOADS, ROUNDS = 100, 4  # a leak grows in every round; a cache that fills, or a table that Python makes anew, in one
BLOCKS = 50  # of Python's heap, a round of 25 loads: two a load
RESIDENT_BYTES = 256 << 10  # a round, counted by the system in pages: 10 KB a load, of which the model takes 350 KB


def held_on_the_host():
    """(bytes of live tensors, open files, objects that can hold others, blocks of Python's heap, resident bytes)."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(t.untyped_storage().nbytes() for t in objects if type(t) is torch.Tensor)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return tensors, len(os.listdir("/proc/self/fd")), len(objects), sys.getallocatedblocks(), resident


def load_often(load, on_device):
    """Load ``LOADS`` times and compare what is held; ``on_device`` counts the bytes of a device's allocator."""
    for _ in range(10):
        load().close()
    gc.collect()
    before = on_device()
    host = [held_on_the_host()]
    for _ in range(ROUNDS):
        for _ in range(LOADS // ROUNDS):
            with load() as model:
                assert model.device.held_bytes > 0
            assert model.device.held_bytes == 0
            assert model.device.held() == ()
            assert on_device() == before
        del model
        host.append(held_on_the_host())
    tensors, files, objects, blocks, resident = zip(*host, strict=True)
    assert set(tensors) == {tensors[0]}
    assert set(files) == {files[0]}
    for held, bound in ((objects, 0), (blocks, BLOCKS), (resident, RESIDENT_BYTES)):
        assert median_low(after - before for before, after in pairwise(held)) <= bound, held


def test_loading_a_hundred_times_leaks_nothing(load):
    load_often(load, on_device=torch.cuda.memory_allocated if torch.cuda.is_available() else lambda: 0)
