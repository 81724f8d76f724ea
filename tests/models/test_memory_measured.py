"""The memory plan's terms against what torch allocates: its segments, and the widest moment of a pass."""

import gc
import itertools

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from triton.runtime.interpreter import GridExecutor

import rooflama
from rooflama.kernels import use_backend
from rooflama.models.memory.allocator import Segments
from small_checkpoint import write_small

MIB = 2**20


@pytest.fixture
def small(tmp_path):
    return write_small(tmp_path / "small.gguf")


def test_segments_follow_the_caching_allocator():
    assert Segments([1]).reserved == 2 * MIB
    assert Segments([MIB] * 2).reserved == 2 * MIB
    assert Segments([MIB + 1]).reserved == 20 * MIB
    assert Segments([3 * MIB] * 6).reserved == 20 * MIB
    assert Segments([3 * MIB] * 7).reserved == 40 * MIB
    assert Segments([10 * MIB]).reserved == 10 * MIB
    assert Segments([11 * MIB - 1]).reserved == 12 * MIB
    assert Segments([250 * MIB, 8 * MIB, 8 * MIB, 512, 512]).reserved == 272 * MIB


def test_a_remainder_too_small_to_keep_is_handed_out_with_its_block():
    assert Segments([1]).taken == 512
    assert Segments([19 * MIB + 1]).taken == 20 * MIB
    assert Segments([9 * MIB] * 2).taken == 18 * MIB  # what is left would serve another request
    assert Segments([9 * MIB, 10 * MIB]).taken == 20 * MIB  # a remainder of 1 MiB is the largest that is not kept


@pytest.mark.gpu
def test_segments_are_torchs_own():
    rng = np.random.default_rng(0)
    sizes = [int(2 ** rng.uniform(6, 26)) for _ in range(200)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    assert torch.cuda.memory_reserved() - before == Segments(sizes).reserved
    del held


def test_prefill_workspace_is_what_the_kernels_allocate(small):
    """Bytes alive at the widest moment of a pass, as torch's profiler counts them."""
    tokens = 128
    with use_backend("triton"), rooflama.load(small, device="cpu", progress=False) as model:
        sequence = model.runner.cache.add()
        peak = allocated_peak(lambda: list(model.runner.prefill([sequence], [[5] * tokens], [0])))
        planned = sum(model.plan.but(context=tokens)._prefill.values())
    assert planned <= peak <= 1.05 * planned


def allocated_peak(call) -> int:
    """The most bytes that torch had allocated at once on the CPU during ``call``.

    The interpreter's arguments live in reference cycles, which are collected after each launch.
    """
    launch = GridExecutor.__call__

    def launch_and_collect(self, *arguments, **options):
        launch(self, *arguments, **options)
        gc.collect()

    gc.collect()
    gc.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", launch_and_collect)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                call()
    finally:
        gc.unfreeze()
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))
