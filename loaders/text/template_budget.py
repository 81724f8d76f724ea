"""What one rendering of a chat template may spend, counted in characters, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.utils import Cycler, Namespace

ITEM_COST = 32  # units; about the bytes that a small item and its place in a list take

INTEGER_BITS = 1024
MAX_DEPTH = 256


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
        self._sizes: dict[
            int, tuple[int, int, Any]
        ] = {}  # id -> (size, depth, container: held, so its id stays its own)

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise OverBudget(f"it makes more than {self._limit:,} characters, each list item counted as {ITEM_COST}")
        self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise OverBudget(f"it takes longer than {self._seconds:g} s")

    def size(self, value: Any) -> int:
        """Units of ``value`` written out in full.

        Raises:
            OverBudget: a container is larger than the budget.
            SecurityError: containers nest deeper than MAX_DEPTH (hashing one would overflow the stack), a number is
                larger than INTEGER_BITS, or a container holds a namespace.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """Size, and how deep containers nest."""
        if isinstance(value, str):
            return ITEM_COST + len(value), 0
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be printed or put into a list")
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise SecurityError(f"whole numbers end at {INTEGER_BITS} bits")
        items = _items(value)
        if items is None:
            return ITEM_COST, 0
        if known := self._sizes.get(id(value)):
            return known[0], known[1]
        total, depth = ITEM_COST, 0
        for index, item in enumerate(items):
            size, below = self._measure(item)
            total, depth = total + size, max(depth, below + 1)
            if total > self._limit:
                raise OverBudget(f"a list in it is larger than {self._limit:,} characters when written out")
            if depth > MAX_DEPTH:
                raise SecurityError(f"lists and dictionaries nest {MAX_DEPTH} deep at most")
            if index % 4096 == 0:
                self._check_time()
        self._sizes[id(value)] = total, depth, value
        return total, depth

    def pay(self, value: Any) -> Any:
        """Pay for a value just made, and hand it on."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(ITEM_COST + len(value) * (1 if isinstance(value, str) else ITEM_COST))
        if not isinstance(value, Namespace):
            self.size(value)
        return value


def _items(value: Any) -> Iterable[Any] | None:
    """What a container holds; None for what is none."""
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    if isinstance(value, ItemsView):
        return chain.from_iterable(value)
    if isinstance(value, Cycler):
        return value.items
    return value if isinstance(value, list | tuple | set | KeysView | ValuesView) else None


current: ContextVar[Budget] = ContextVar("budget of the rendering at work")
