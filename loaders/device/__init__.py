"""The device boundary: the only code that allocates long-lived device memory, copies to and from it, and asks the
driver about memory.

    with open_device("auto", memory_limit=8 * 2**30) as device:
        weights = device.upload(array, label="blk.0.attn_q.weight")
        cache = device.allocate((num_pages, 16, 3, 64), torch.float16, label="k_pages.0")
        ...weights.tensor...

Ownership:
- A Device owns each DeviceBuffer that it makes until the buffer or the device is closed. Dropping the last reference to
  a buffer does not free it. ``held()`` lists what is held, and closing the device frees all of it.
- ``buffer.tensor`` belongs to the buffer; after ``close`` it can no longer be read. A tensor or view taken before stays
  valid and keeps the memory, and ``held_bytes`` counts it until the last such view is dropped.
- ``buffer.close()`` is idempotent. ``device.free(buffer)`` demands a live buffer, and is refused the second time.
- ``upload`` copies. With ``borrow=True`` a CPU device uses the host memory without a copy: it remains the caller's, who
  must not change it. A borrowed buffer is counted like any other.

Failures of the driver are raised as the errors in ``errors``, with numbers. A call that fails frees what it allocated
before it raises. ``memory_limit`` is checked before every allocation, on every kind of device.
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
