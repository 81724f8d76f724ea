"""Fences around what launchers allocate, and a queue for tests that take gigabytes of a GPU."""

import fcntl
import gc
import tempfile
from collections import deque
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rooflama.testing.assertions import assert_guards_intact
from rooflama.testing.strategies import DEVICE, guarded

KEPT = 64  # allocations that stay under watch, so that a later launch is seen writing beside an earlier one's output


@pytest.fixture(autouse=True)
def fenced_allocations(monkeypatch, request):
    """On the CPU, ``torch.empty`` hands out the middle of a larger, poisoned buffer; a GPU has compute-sanitizer.

    Not under opcheck and torch.compile, whose own tensors are no kernel's.
    """
    if DEVICE.type != "cpu" or "opcheck" in request.node.name or "compile" in request.node.name:
        yield
        return
    watched: deque[tuple[torch.Tensor, str]] = deque()
    empty = torch.empty

    def check(keep: int) -> None:
        while len(watched) > keep:
            buffer, what = watched.popleft()
            assert_guards_intact(buffer, context=what)

    def fenced(*args, **options):
        plain = empty(*args, **options)
        if _get_current_dispatch_mode() is not None or plain.device.type != "cpu" or not plain.is_contiguous():
            return plain
        tensor, buffer = guarded(plain)
        watched.append((buffer, f"an allocation of {list(plain.shape)} {plain.dtype}"))
        check(KEPT)
        return tensor

    monkeypatch.setattr(torch, "empty", fenced)
    yield
    check(0)


@pytest.fixture(autouse=True)
def one_at_a_time(request):
    """On a GPU, tests whose offsets pass 2^31 run one after another, whichever process they are in."""
    if DEVICE.type == "cpu" or "beyond_int32" not in request.node.name:
        yield
        return
    with Path(tempfile.gettempdir(), "rooflama-tests-beyond-int32").open("w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()
