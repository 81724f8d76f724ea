"""A device and the buffers allocated on it. The docstring of the package describes ownership."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import raw
from .errors import (
    CopyOutOfRange,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DoubleFree,
    UseAfterClose,
    translate,
)
from .ledger import Ledger, allocation_site
from .query import device_name, find_device, free_and_total_bytes

Progress = Callable[[int], object]  # called with the bytes copied since the last call
_numbers = itertools.count(1)  # distinguishes devices of one name in leak reports


class _Scopes(threading.local):
    """The buffers made in each open ``all_or_nothing`` block of this thread."""

    def __init__(self) -> None:
        self.open: list[list[DeviceBuffer]] = []


def open_device(spec: str | torch.device = "auto", *, memory_limit: int | None = None) -> Device:
    """Open the device that ``spec`` names.

    Args:
        spec: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", "hip", "hip:1".
        memory_limit: the most bytes that may be held at once; None for no limit.

    Raises:
        DeviceUnavailable: the name is unknown, there is no such device or driver, or torch was built without it.
        DeviceError: ``memory_limit`` is not a positive integer.
    """
    if memory_limit is not None and (type(memory_limit) is not int or memory_limit <= 0):
        raise DeviceError(
            f"memory_limit {memory_limit!r}",
            rule="a limit is a positive whole number of bytes",
            remedy="Give None for no limit",
        )
    torch_device, kind = find_device(str(spec))
    return Device(torch_device, kind, memory_limit)


class DeviceBuffer:
    """Memory on a device, which owns it. Made by ``Device.allocate`` and ``Device.upload``."""

    def __init__(self, device: Device, tensor: Tensor, label: str):
        self.device, self.label = device, label
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.nbytes = tensor.numel() * tensor.element_size()
        self._tensor: Tensor | None = tensor

    @property
    def tensor(self) -> Tensor:
        """The memory, until ``close``.

        Raises:
            UseAfterClose: the buffer or its device was closed.
        """
        if self._tensor is None:
            raise UseAfterClose(
                f"buffer {self.label!r} ({self.nbytes} bytes on {self.device.name})",
                rule="it was closed",
                remedy="Keep it open for as long as it is used, or upload it again",
            )
        return self._tensor

    @property
    def closed(self) -> bool:
        return self._tensor is None

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self.device._release(self)

    def __enter__(self) -> DeviceBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes} bytes on {self.device.torch_device}"
        return f"DeviceBuffer({self.label!r}, {list(self.shape)}, {self.dtype}, {state})"


class Device:
    """A CPU, CUDA or HIP device and its buffers. Made by ``open_device``; may be used from several threads.

    Attributes:
        torch_device: the device of its buffers' tensors; torch calls HIP devices "cuda" too.
        kind: "cpu", "cuda" or "hip".
        name: its name according to the driver.
        memory_limit: the most bytes that may be held at once, or None.
    """

    def __init__(self, torch_device: torch.device, kind: str, memory_limit: int | None):
        self.torch_device, self.kind, self.memory_limit = torch_device, kind, memory_limit
        self.name = device_name(torch_device)
        self._buffers: dict[int, DeviceBuffer] = {}
        self._ledger = Ledger(f"{torch_device} ({self.name}), opened as number {next(_numbers)}")
        self._scopes = _Scopes()
        self._lock = threading.RLock()
        self._staging: raw.Staging | None = None
        self._closed = False
        self._lost: str | None = None
        weakref.finalize(self, self._ledger.report)  # when collected or at exit

    @property
    def total_bytes(self) -> int:
        """Memory of the device according to the driver, now."""
        return self._memory()[1]

    @property
    def free_bytes(self) -> int:
        """Free memory of the device according to the driver, now. Ignores ``memory_limit``."""
        return self._memory()[0]

    @property
    def held_bytes(self) -> int:
        """Bytes of all open buffers, and of closed buffers whose memory a view still keeps."""
        with self._lock:
            return self._ledger.held_bytes()

    def held(self) -> tuple[DeviceBuffer, ...]:
        """The open buffers, oldest first."""
        with self._lock:
            return tuple(self._buffers.values())

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, *, label: str) -> DeviceBuffer:
        """Allocate memory with undefined contents, owned by this device.

        Raises:
            DeviceOutOfMemory: the allocation exceeds ``memory_limit``, or what the device has.
            UseAfterClose, DeviceLost: the device is closed, or has failed.
        """
        if any(n < 0 for n in shape):
            raise DeviceError(
                f"shape {list(shape)} of {label!r}", rule="sizes are not negative", remedy="Correct the shape"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._check_room(nbytes, label)
            with self.guard(f"allocating {label!r}", asked=nbytes):
                tensor = raw.allocate(shape, dtype, self.torch_device, label, nbytes)
            return self._own(tensor, label)

    def allocate_shared(self, nbytes: int, *, label: str) -> DeviceBuffer:
        """Allocate memory that GPUs of other processes on this host can map: uint8 [nbytes], zero at first.

        It is torch's symmetric memory, mapped by ``torch.distributed._symmetric_memory.rendezvous``.

        Raises:
            DeviceOutOfMemory, UseAfterClose, DeviceLost: as for ``allocate``.
        """
        with self._lock:
            self._check_room(nbytes, label)
            with self.guard(f"allocating {label!r}", asked=nbytes):
                tensor = raw.allocate_shared(nbytes, self.torch_device, label)
            return self._own(tensor, label)

    def upload(
        self,
        source: Tensor | np.ndarray,
        *,
        label: str,
        borrow: bool = False,
        progress: Progress | None = None,
    ) -> DeviceBuffer:
        """Copy host memory to this device; to a GPU through double-buffered pinned memory.

        Args:
            source: of any shape; may be read-only and memory-mapped.
            label: the buffer's name in ``held`` and in errors.
            borrow: on a CPU device, use ``source`` itself without a copy if it is contiguous. A GPU ignores this.
            progress: called with the bytes copied since its last call.

        Raises:
            DeviceOutOfMemory, DeviceLost, UseAfterClose: as for ``allocate``; nothing stays allocated.
            DeviceError: ``source`` is not in host memory.
        """
        host = raw.host_tensor(source, label)
        borrow = borrow and self.kind == "cpu"
        if borrow:
            with self._lock:
                self._check_room(host.nbytes, label, exists=True)
                buffer = self._own(host, label)
        else:
            buffer = self.allocate(tuple(host.shape), host.dtype, label=label)
        try:
            if not borrow:
                self.copy_in(buffer, host, progress=progress)
            elif progress is not None:
                progress(host.nbytes)
        except BaseException:
            buffer.close()
            raise
        return buffer

    def copy_in(
        self,
        buffer: DeviceBuffer,
        source: Tensor | np.ndarray,
        *,
        offset_bytes: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Copy the bytes of ``source`` into the buffer at ``offset_bytes``; complete on return.

        Raises:
            CopyOutOfRange: the bytes would pass the end of the buffer.
        """
        host = raw.host_tensor(source, buffer.label)
        with self._lock, self.guard(f"copying {buffer.label!r} to the device", asked=host.nbytes):
            if self.kind != "cpu" and self._staging is None:
                self._staging = raw.Staging(self.torch_device, buffer.label)
            raw.copy_in(
                self._range(buffer, offset_bytes, host.nbytes),
                raw.as_bytes(host),
                self._staging,
                buffer.label,
                progress,
            )

    def download(self, buffer: DeviceBuffer) -> Tensor:
        """Copy the buffer to host memory: [buffer.shape]."""
        return self.download_bytes(buffer, 0, buffer.nbytes).view(buffer.dtype).view(buffer.shape)

    def download_bytes(self, buffer: DeviceBuffer, offset_bytes: int, nbytes: int) -> Tensor:
        """Copy part of the buffer to host memory: uint8 [nbytes].

        Raises:
            CopyOutOfRange: the range passes the end of the buffer.
        """
        with self._lock, self.guard(f"copying {buffer.label!r} from the device", asked=nbytes):
            return raw.copy_out(self._range(buffer, offset_bytes, nbytes), buffer.label)

    def free(self, buffer: DeviceBuffer) -> None:
        """Free an open buffer of this device.

        Raises:
            DoubleFree: the buffer was freed or closed before.
            DeviceError: another device owns the buffer.
        """
        with self._lock:
            self._check_mine(buffer)
            if buffer.closed:
                raise DoubleFree(
                    f"buffer {buffer.label!r} ({buffer.nbytes} bytes)",
                    rule="it was freed before",
                    remedy="Free it once, or call buffer.close(), which may be repeated",
                )
            self._release(buffer)

    def capture(self, work: Callable[[], object], memory_pool: Any = None) -> torch.cuda.CUDAGraph:
        """Capture what ``work`` launches on this GPU as a graph. Run it once before: a capture cannot compile.

        ``memory_pool`` is from ``torch.cuda.graph_pool_handle``, for graphs that share their memory since they never
        run at the same time; None gives the graph memory of its own.

        Raises:
            UseAfterClose, DeviceOutOfMemory, DeviceLost: as for ``allocate``.
        """
        with self.guard("capturing a CUDA graph"):
            raw.keep_graph_state(self.torch_device)
            return raw.capture(work, self.torch_device, memory_pool)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block raises, close every buffer that this thread made in it."""
        made: list[DeviceBuffer] = []
        self._scopes.open.append(made)
        try:
            yield
        except BaseException:
            for buffer in reversed(made):
                buffer.close()
            raise
        finally:
            self._scopes.open.pop()

    @contextmanager
    def guard(self, doing: str, *, asked: int | None = None) -> Iterator[None]:
        """Raise failures of the driver inside the block as errors of this package; for kernels and workspaces too.

        Args:
            doing: what the block does, for the message.
            asked: the bytes that the block allocates, if any.

        Raises:
            UseAfterClose: the device was closed.
            DeviceOutOfMemory, DeviceLost: the driver failed. After DeviceLost, every further call raises DeviceLost.
        """
        self._check_open(doing)
        try:
            yield
        except Exception as error:
            translated = translate(error, doing, asked, self._numbers)
            if translated is None:
                raise
            if isinstance(translated, DeviceLost):
                self._lost = translated.said
            raise translated from error

    def close(self) -> None:
        """Free all buffers, newest first, and refuse further use. Idempotent."""
        with self._lock:
            for buffer in reversed(list(self._buffers.values())):
                self._release(buffer)
            self._staging = None
            self._closed = True
            if self.kind != "cpu" and self._lost is None:
                torch.cuda.empty_cache()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._buffers)} buffers, {self.held_bytes} bytes held"
        return f"Device({self.torch_device}, {self.name!r}, {state})"

    def _own(self, tensor: Tensor, label: str) -> DeviceBuffer:
        buffer = DeviceBuffer(self, tensor, label)
        self._buffers[id(buffer)] = buffer
        self._ledger.live[id(buffer)] = (label, buffer.nbytes, allocation_site())
        for made in self._scopes.open:
            made.append(buffer)
        return buffer

    def _release(self, buffer: DeviceBuffer) -> None:
        with self._lock:
            tensor, buffer._tensor = buffer._tensor, None
            if tensor is None:
                return
            del self._buffers[id(buffer)], self._ledger.live[id(buffer)]
            storage = StorageWeakRef(tensor.untyped_storage())
            del tensor
            if not storage.expired():
                self._ledger.viewed.append((buffer.nbytes, storage))

    def _range(self, buffer: DeviceBuffer, offset_bytes: int, nbytes: int) -> Tensor:
        """A view of bytes of the buffer, starting at ``offset_bytes``: uint8 [nbytes]."""
        self._check_mine(buffer)
        flat = raw.as_bytes(buffer.tensor)
        if offset_bytes < 0 or nbytes < 0 or offset_bytes + nbytes > buffer.nbytes:
            raise CopyOutOfRange(
                f"bytes {offset_bytes} to {offset_bytes + nbytes} of buffer {buffer.label!r}",
                rule=f"it has {buffer.nbytes} bytes",
                remedy="Copy within the buffer, or allocate a larger one",
            )
        return flat[offset_bytes : offset_bytes + nbytes]

    def _check_mine(self, buffer: DeviceBuffer) -> None:
        if buffer.device is not self:
            raise DeviceError(
                f"buffer {buffer.label!r} of {buffer.device!r}",
                rule="a buffer is copied and freed by the device that made it",
                remedy="Call the methods of buffer.device",
            )

    def _check_open(self, doing: str) -> None:
        if self._closed:
            raise UseAfterClose(
                f"{doing} on {self.name}", rule="the device was closed", remedy="Open it again with open_device"
            )
        if self._lost is not None:
            raise DeviceLost.during(doing, self._lost)

    def _check_room(self, nbytes: int, label: str, *, exists: bool = False) -> None:
        """Refuse an allocation beyond the limit or, unless the memory ``exists`` already, beyond the device."""
        self._check_open(f"allocating {label!r}")
        free, total = self._memory()
        over_limit = self.memory_limit is not None and self._ledger.held_bytes() + nbytes > self.memory_limit
        # On a CPU, Linux overcommits and then kills the process. On a GPU, torch may reuse memory that counts as taken.
        if over_limit or (not exists and nbytes > (free if self.kind == "cpu" else total)):
            raise DeviceOutOfMemory.asking(nbytes, f"allocating {label!r}", self._numbers())

    def _memory(self) -> tuple[int, int]:
        return free_and_total_bytes(self.torch_device)

    def _numbers(self) -> dict[str, int | None]:
        free, total = self._memory() if self._lost is None else (0, 0)
        return {"free": free, "total": total, "limit": self.memory_limit, "held": self._ledger.held_bytes()}
