"""What one rendering of a chat template may spend, counted in characters, and how long it may take."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

ITEM_COST = 32  # units; about the bytes that a small item and its place in a list take

INTEGER_BITS = 1024


class OverBudget(Exception):
    """The rendering took more time, or made more, than it may."""


class Budget:
    """What one rendering may still spend.

    Args:
        units: characters it may make in all, and the largest that one value may be when written out.
        seconds: wall-clock time.
    """

    def __init__(self, units: int, seconds: float):
        self.left = self._limit = units
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._sizes: dict[int, tuple[int, Any]] = {}  # id -> (size, the container, held so that its id stays its own)

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise OverBudget(f"it makes more than {self._limit:,} characters, each list item counted as {ITEM_COST}")
        self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise OverBudget(f"it takes longer than {self._seconds:g} s")

    def size(self, value: Any) -> int:
        """Units of ``value`` written out in full."""
        if isinstance(value, str):
            return ITEM_COST + len(value)
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be printed or put into a list")
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise SecurityError(f"whole numbers end at {INTEGER_BITS} bits")
        if not isinstance(value, list | tuple | dict):
            return ITEM_COST
        known = self._sizes.get(id(value))
        if known:
            return known[0]
        total = ITEM_COST
        for index, item in enumerate((*value.keys(), *value.values()) if isinstance(value, dict) else value):
            total += self.size(item)
            if total > self._limit:
                raise OverBudget(f"a list in it is larger than {self._limit:,} characters when written out")
            if index % 4096 == 0:
                self._check_time()
        self._sizes[id(value)] = total, value
        return total

    def pay(self, value: Any) -> Any:
        """Pay for a value just made, and hand it on."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(ITEM_COST + len(value) * (1 if isinstance(value, str) else ITEM_COST))
        if not isinstance(value, Namespace):
            self.size(value)
        return value


current: ContextVar[Budget] = ContextVar("budget of the rendering at work")
