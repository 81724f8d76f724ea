"""The record of what a device holds and where it was allocated."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from types import FrameType

from torch.multiprocessing.reductions import StorageWeakRef


class LeakWarning(RuntimeWarning):
    """With ROOFLAMA_DEBUG: device memory that was not closed, reported when its device is collected, or at exit."""


@dataclass
class Ledger:
    """What a device holds. Separate from the Device, so that it can be reported after the Device is collected."""

    device: str
    live: dict[int, tuple[str, int, str]] = field(default_factory=dict)  # buffer id -> label, bytes, where made
    viewed: list[tuple[int, StorageWeakRef]] = field(default_factory=list)  # closed, but a view may keep the memory

    def held_bytes(self) -> int:
        self.viewed = [(nbytes, storage) for nbytes, storage in self.viewed if not storage.expired()]
        return sum(nbytes for _, nbytes, _ in self.live.values()) + sum(nbytes for nbytes, _ in self.viewed)

    def report(self) -> None:
        """If ROOFLAMA_DEBUG is set, warn about buffers that are still held, and where they were made."""
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
    """The line that allocates and the user's line that led to it; "" unless ROOFLAMA_DEBUG is set, to save time."""
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
