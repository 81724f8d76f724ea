"""Limits of what tests may take: bytes that a copy moves at a time, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

SMALL_CHUNK = 1 << 12  # bytes that a copy moves at a time under the fixture small_chunks
T = TypeVar("T")


def within_seconds(limit: float, function: Callable[..., T], *arguments: object) -> T:
    """The function's result, if the best of three calls takes less than ``limit`` seconds of CPU time."""
    taken = []
    while not taken or taken[-1] >= limit:
        assert len(taken) < 3, f"{min(taken):.2f} s of CPU at best, and {limit} are allowed"
        start = time.process_time()
        result = function(*arguments)
        taken.append(time.process_time() - start)
    return result
