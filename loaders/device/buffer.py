"""One piece of device memory, and the ledger of all that a device holds."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import UseAfterClose

if TYPE_CHECKING:
    from .device import Device


class LeakWarning(RuntimeWarning):
    """With ROOFLAMA_DEBUG: device memory nobody closed, reported when its device is collected, or at exit."""


class DeviceBuffer:
    """Memory on a device, owned by it. Made by ``Device.allocate`` and ``Device.upload``."""

    def __init__(self, device: Device, tensor: Tensor, label: str):
        self.device, self.label = device, label
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.nbytes = tensor.numel() * tensor.element_size()
        self._tensor: Tensor | None = tensor

    @property
    def tensor(self) -> Tensor:
        """The memory, lent until ``close``.

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
        """Give the memory back. Idempotent."""
        self.device._release(self)

    def __enter__(self) -> DeviceBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes} bytes on {self.device.torch_device}"
        return f"DeviceBuffer({self.label!r}, {list(self.shape)}, {self.dtype}, {state})"


@dataclass
class Ledger:
    """What a device holds. Apart from the Device, so that it can be reported once the Device is gone."""

    device: str
    live: dict[int, tuple[str, int, str]] = field(default_factory=dict)  # buffer id -> label, bytes, where made
    lent: list[tuple[int, StorageWeakRef]] = field(default_factory=list)  # closed, but a view may keep the memory

    def held_bytes(self) -> int:
        self.lent = [(nbytes, storage) for nbytes, storage in self.lent if not storage.expired()]
        return sum(nbytes for _, nbytes, _ in self.live.values()) + sum(nbytes for nbytes, _ in self.lent)

    def report(self) -> None:
        """If ROOFLAMA_DEBUG is set, warn of what is still held, and where each was made."""
        if not self.live or not _debugging():
            return
        total = sum(nbytes for _, nbytes, _ in self.live.values())
        lines = [
            f"{len(self.live)} buffers, {total} bytes, still held on {self.device}: close the device that owns them"
        ]
        for label, nbytes, site in list(self.live.values())[:20]:
            lines.append(f"  {label}: {nbytes} bytes" + (f", made at {site}" if site else ""))
        if len(self.live) > 20:
            lines.append(f"  and {len(self.live) - 20} more")
        warnings.warn("\n".join(lines), LeakWarning, stacklevel=2)


def _debugging() -> bool:
    return os.environ.get("ROOFLAMA_DEBUG", "0") not in ("", "0")


def allocation_site() -> str:
    """The line that allocates and the user's line that led there, if ROOFLAMA_DEBUG is set; the walk costs time."""
    if not _debugging():
        return ""
    places: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        outside = module.split(".")[0] != "rooflama"
        if outside or (not places and not module.startswith("rooflama.loaders.device")):
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        if outside:
            break
        frame = frame.f_back
    return ", for ".join(places)
