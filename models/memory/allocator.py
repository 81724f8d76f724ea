"""The bytes that torch's caching allocator takes from the driver for a series of allocations.

Sizes are rounded up to 512 bytes. Sizes up to 1 MiB are cut from segments of 2 MiB, and sizes up to 10 MiB from
segments of 20 MiB. Each larger size gets its own segment, rounded up to 2 MiB. The rest of a segment serves later
requests of the same pool, best fit first; in the pool of larger sizes, only rests above 1 MiB do.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

MIB = 2**20

ROUND_BYTES = 512
SMALL_BYTES = 1 * MIB  # the largest request of the small pool; rests up to it are not reused in the large pool
SMALL_SEGMENT = 2 * MIB
SHARED_BYTES = 10 * MIB  # requests below share segments
SHARED_SEGMENT = 20 * MIB
OWN_ROUND = 2 * MIB


class Segments:
    """The bytes of allocations that are not freed.

    Attributes:
        asked: of all requests.
        taken: of the blocks that serve them, as ``torch.cuda.memory_allocated`` counts.
        reserved: of all segments.
    """

    def __init__(self, sizes: Iterable[int] = ()):
        self.asked = 0
        self.taken = 0
        self.reserved = 0
        self._free: dict[bool, list[int]] = {True: [], False: []}
        self.take_all(sizes)

    def take_all(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            self.take(size)

    def take(self, nbytes: int) -> None:
        if nbytes <= 0:
            return
        self.asked += nbytes
        size = _round_up(nbytes, ROUND_BYTES)
        small = size <= SMALL_BYTES
        free = self._free[small]
        fit = bisect_left(free, size)
        if fit < len(free):
            block = free.pop(fit)
        else:
            shared = SMALL_SEGMENT if small else SHARED_SEGMENT
            block = shared if size < SHARED_BYTES else _round_up(size, OWN_ROUND)
            self.reserved += block
        rest = block - size
        if rest >= (ROUND_BYTES if small else SMALL_BYTES + 1):
            insort(free, rest)
            self.taken += size
        else:
            self.taken += block

    def copy(self) -> Segments:
        twin = Segments()
        twin.asked, twin.taken, twin.reserved = self.asked, self.taken, self.reserved
        twin._free = {small: list(free) for small, free in self._free.items()}
        return twin


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
