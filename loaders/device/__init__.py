"""The device boundary: the one place that allocates long-lived device memory, moves bytes to and from it, and asks the
driver what is there.

    with open_device("auto", memory_limit=8 * 2**30) as device:
        weights = device.upload(array, label="blk.0.attn_q.weight")
        cache = device.allocate((num_pages, 16, 3, 64), torch.float16, label="k_pages.0")
        ...weights.tensor...

Who owns what:
- A Device owns every DeviceBuffer it makes until the buffer is closed or the device is. Dropping the last reference to
  a buffer does not free it: what is held is what ``held()`` lists, and closing the device frees all of it.
- ``buffer.tensor`` is lent. After close, asking for it again is refused; a tensor or view taken before stays valid and
  keeps the memory, and ``held_bytes`` goes on counting it, until the last such view goes.
- ``buffer.close()`` means "I need it no longer" and may be said any number of times. ``device.free(buffer)`` means
  "it is live and I end it", and is refused the second time.
- ``upload`` copies. With ``borrow=True`` a CPU device takes the host memory as it is, without a copy: it stays the
  caller's, who must not change it; it is counted like any other buffer.

Failures of the driver become the errors of ``errors``, with numbers. What was made for a call that fails is
freed before its error leaves. ``memory_limit`` is checked before every allocation, on every kind of device.
"""

from .device import Device, DeviceBuffer, open_device
from .errors import (
    CopyOutOfRange,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceUnavailable,
    DoubleFree,
    UseAfterClose,
)
from .ledger import LeakWarning

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
