"""The raw operations of the device boundary: allocation, copies in chunks, and graph capture.

Copies to a GPU go through two pinned buffers in turn. The copy engine reads pinned memory at the speed of the link, and
pageable memory at a fraction of it. While one buffer is sent, torch's threads fill the other; a single thread's memcpy
would be slower than the link.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DeviceError

CHUNK_BYTES = 64 * 2**20


def before_operation(operation: str, label: str, nbytes: int) -> None:
    """Called before each operation, "allocate" or "copy". Does nothing; tests replace it to make operations fail."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, label: str, nbytes: int) -> Tensor:
    """Memory with undefined contents. Allocated inside torch.inference_mode, it can be used outside too."""
    before_operation("allocate", label, nbytes)
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def allocate_shared(nbytes: int, device: torch.device, label: str) -> Tensor:
    """uint8 [nbytes] of zeros, in memory that other processes can map; written on return."""
    from torch.distributed import _symmetric_memory

    before_operation("allocate", label, nbytes)
    with torch.inference_mode(False):
        tensor = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        tensor.zero_()
    torch.cuda.synchronize(device)
    return tensor


class Staging:
    """Two pinned buffers, a copy stream, and per buffer the event after which it may be filled again."""

    def __init__(self, device: torch.device, label: str):
        before_operation("allocate", label, 2 * CHUNK_BYTES)
        self.buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.stream = torch.cuda.Stream(device)
        self.sent = [torch.cuda.Event() for _ in range(2)]

    def copy_in(self, target: Tensor, source: Tensor, before_chunk: Callable[[int], None], after_chunk) -> None:
        """Copy uint8 [n] on the host to uint8 [n] on the device; complete on return."""
        self.stream.wait_stream(torch.cuda.current_stream(target.device))  # after the work that uses the target now
        size = self.buffers[0].numel()
        try:
            for i, start in enumerate(range(0, source.numel(), size)):
                chunk = source[start : start + size]
                before_chunk(chunk.numel())
                pinned, sent = self.buffers[i % 2][: chunk.numel()], self.sent[i % 2]
                sent.synchronize()
                pinned.copy_(chunk)
                with torch.cuda.stream(self.stream):
                    target[start : start + size].copy_(pinned, non_blocking=True)
                    sent.record(self.stream)
                after_chunk(chunk.numel())
        finally:
            self.stream.synchronize()  # from here on the pinned buffers and the target may be reused
            del target  # a traceback that is kept must not keep device memory


def copy_in(
    target: Tensor,
    source: Tensor,
    staging: Staging | None,
    label: str,
    progress: Callable[[int], object] | None,
) -> None:
    """Copy uint8 [n] on the host to ``target``, uint8 [n], in chunks. ``staging`` is None for a target on the CPU."""

    def before(nbytes: int) -> None:
        before_operation("copy", label, nbytes)

    def after(nbytes: int) -> None:
        if progress is not None:
            progress(nbytes)

    try:
        if staging is not None:
            staging.copy_in(target, source, before, after)
            return
        for start in range(0, source.numel(), CHUNK_BYTES):
            chunk = source[start : start + CHUNK_BYTES]
            before(chunk.numel())
            target[start : start + CHUNK_BYTES].copy_(chunk)
            after(chunk.numel())
    finally:
        del target  # a traceback that is kept must not keep device memory


def copy_out(source: Tensor, label: str) -> Tensor:
    """Copy uint8 [n] to the host; complete on return."""
    try:
        before_operation("copy", label, source.numel())
        return source.to("cpu", copy=True)
    finally:
        del source


@functools.cache
def keep_graph_state(device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture one small graph and keep it for the life of the process.

    Up to 2.12, torch allocates its random state for graphs with the first graph. If that allocation fails, the
    incomplete graph aborts the process when it is collected (a check in its destructor). While this graph lives, the
    state exists.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        target, *state = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3))
        del state  # freed into the cache of this stream, where torch's two allocations find them
        graph = torch.cuda.CUDAGraph()
        with _no_collection():
            graph.capture_begin()
            target.zero_()
            graph.capture_end()
    return graph


def capture(work: Callable[[], object], device: torch.device, memory_pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture what ``work`` launches on ``device`` as a graph, whose memory comes from ``memory_pool``."""
    graph = torch.cuda.CUDAGraph()
    capturing = torch.cuda.graph(graph, pool=memory_pool, stream=_capture_stream(device))
    with torch.cuda.device(device), _no_collection(), capturing:
        work()
    return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, since cuBLAS keeps a workspace per stream; torch's own is on one device only."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's garbage collector during a capture.

    It could free pinned memory or another graph, which the driver does not allow while it captures.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def host_tensor(source: Tensor | np.ndarray, label: str) -> Tensor:
    """``source`` as a contiguous CPU tensor; no copy if it is contiguous already."""
    if not isinstance(source, Tensor):
        array = np.asarray(source)
        try:
            with warnings.catch_warnings():  # a read-only array is only read here
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                return torch.from_numpy(np.ascontiguousarray(array)).view(array.shape)
        except (TypeError, ValueError) as error:
            raise DeviceError(
                f"source of {label!r} is an array of {array.dtype}",
                rule="uploads have a dtype of torch, in this machine's byte order",
                remedy="Convert it first",
            ) from error
    if source.device.type != "cpu":
        raise DeviceError(
            f"source of {label!r} on {source.device}",
            rule="uploads come from host memory",
            remedy="Download it first, or use it where it is",
        )
    return source.detach().contiguous()


def as_bytes(tensor: Tensor) -> Tensor:
    """A view of the tensor's memory, uint8 [nbytes]."""
    if tensor.numel() == 0:  # torch cannot view the stride that NumPy gives empty arrays
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.reshape(-1).view(torch.uint8)
