"""What can go wrong at the device boundary, and how the driver's own failures are recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rooflama.kernels.errors import RooflamaError

GIB = 2**30


class DeviceError(RooflamaError):
    """Base of the errors of the device boundary."""


class DeviceUnavailable(DeviceError):
    """The device does not exist, or torch or the driver cannot use it."""


class DeviceOutOfMemory(DeviceError):
    """An allocation that does not fit. ``asked``, ``free``, ``total``, ``held``, ``limit``: bytes, None if unknown."""

    asked: int | None = None
    free: int | None = None
    total: int | None = None
    held: int | None = None
    limit: int | None = None

    @classmethod
    def asking(cls, asked: int | None, doing: str, numbers: Mapping[str, int | None]) -> DeviceOutOfMemory:
        free, total, held, limit = (numbers[name] for name in ("free", "total", "held", "limit"))
        over_limit = limit is not None and held is not None and asked is not None and held + asked > limit
        found = f"{doing}: asked {_gib(asked)}, {_gib(free)} free of {_gib(total)}, {_gib(held)} held"
        if over_limit:
            rule = f"what is held stays within the memory limit of {_gib(limit)}"
            remedy = "Raise memory_limit, close unused buffers, or use a smaller context or kv_dtype='int8'"
        else:
            rule = "an allocation fits into the device's free memory"
            remedy = "Close unused buffers, end other programs on the device, or use a smaller context"
        error = cls(found, rule=rule, remedy=remedy)
        error.asked, error.free, error.total, error.held, error.limit = asked, free, total, held, limit
        return error


class DeviceLost(DeviceError):
    """A failure after which the process cannot use the device. ``said``: the first line of the driver's message."""

    said: str = ""

    @classmethod
    def during(cls, doing: str, said: str) -> DeviceLost:
        error = cls(
            f"{doing}: the driver said {said!r}",
            rule="the device must answer",
            remedy="Start a new process; with CUDA_LAUNCH_BLOCKING=1 the error names the call at fault, "
            "and nvidia-smi or rocm-smi shows the state of the device",
        )
        error.said = said
        return error


class CopyOutOfRange(DeviceError):
    """A copy that would pass the end of a buffer. Nothing is copied."""


class UseAfterClose(DeviceError):
    """A closed buffer or device was used."""


class DoubleFree(DeviceError):
    """``Device.free`` was called on a buffer that is no longer live."""


def translate(
    error: Exception, doing: str, asked: int | None, numbers: Callable[[], Mapping[str, int | None]]
) -> DeviceError | None:
    """The error of this package for an error of torch; None if the device did not fail."""
    if isinstance(error, RooflamaError):
        return None
    said = str(error)
    memory = ("out of memory", "can't allocate memory", "cannot allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said.lower() for words in memory)
    ):
        return DeviceOutOfMemory.asking(asked, doing, numbers())
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in said for words in ("CUDA error", "HIP error", "CUDA driver"))
    ):
        return DeviceLost.during(doing, said.splitlines()[0] if said else type(error).__name__)
    return None


def _gib(nbytes: int | None) -> str:
    if nbytes is None:
        return "an unknown amount"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 100 else f"{nbytes} bytes"
