"""The budget of one rendering of a chat template: characters that it may make, and seconds that it may take."""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.utils import Cycler, Namespace

ITEM_COST = 32  # units per list item; about the bytes of a small item and its slot in a list

INTEGER_BITS = 1024
MAX_DEPTH = 256


class OverBudget(Exception):
    """The rendering exceeded its time or its characters."""


class Budget:
    """What a rendering may still spend.

    Args:
        units: the characters that it may make in total, and that a single value may have when written out.
        seconds: the wall-clock time that it may take.
    """

    def __init__(self, units: int, seconds: float):
        self.left = self._limit = units
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        # id -> size, depth, and the container itself, so that its id is not reused
        self._sizes: dict[int, tuple[int, int, Any]] = {}

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise OverBudget(f"it makes more than {self._limit:,} characters, each list item counted as {ITEM_COST}")
        self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise OverBudget(f"it takes longer than {self._seconds:g} s")

    def size(self, value: Any) -> int:
        """The units of ``value`` when written out in full.

        Raises:
            OverBudget: a container is larger than the budget.
            SecurityError: containers nest deeper than MAX_DEPTH (hashing one would overflow the stack), a number is
                larger than INTEGER_BITS, or a container holds a namespace.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """The units of ``value``, and the depth to which its containers nest."""
        if isinstance(value, str):
            return ITEM_COST + len(value), 0
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be printed or put into a list")
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise SecurityError(f"integers have at most {INTEGER_BITS} bits")
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
                raise SecurityError(f"lists and dictionaries nest at most {MAX_DEPTH} deep")
            if index % 4096 == 0:
                self._check_time()
        self._sizes[id(value)] = total, depth, value
        return total, depth

    def pay(self, value: Any) -> Any:
        """Spend the units of a new value, and return it."""
        if isinstance(value, str | list | tuple | dict):
            self.spend(ITEM_COST + len(value) * (1 if isinstance(value, str) else ITEM_COST))
        if not isinstance(value, Namespace):
            self.size(value)
        return value


def _items(value: Any) -> Iterable[Any] | None:
    """The items of a container; None if ``value`` is not one."""
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    if isinstance(value, ItemsView):
        return chain.from_iterable(value)
    if isinstance(value, Cycler):
        return value.items
    return value if isinstance(value, list | tuple | set | KeysView | ValuesView) else None


current: ContextVar[Budget] = ContextVar("budget of the current rendering")
