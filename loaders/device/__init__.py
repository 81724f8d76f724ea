"""The device boundary: the one place that allocates long-lived device memory, moves bytes and asks the driver."""

from .buffer import DeviceBuffer, LeakWarning
from .device import Device, open_device
from .errors import (
    CopyOutOfRange,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceUnavailable,
    DoubleFree,
    UseAfterClose,
)

__all__ = [
    "CopyOutOfRange",
    "Device",
    "DeviceBuffer",
    "DeviceError",
    "DeviceLost",
    "DeviceOutOfMemory",
    "DeviceUnavailable",
    "DoubleFree",
    "LeakWarning",
    "UseAfterClose",
    "open_device",
]
