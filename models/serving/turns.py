"""Turns on one engine: a lock that threads get in the order in which they ask for it."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A fair lock. A thread may take it again while it holds it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None  # the thread whose turn it is
        self._depth = 0

    def turn(self) -> Turns:
        """A ``with`` block that waits for a turn and holds it. A thread may begin a turn within its own."""
        return self

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            self._join()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._leave()

    def _join(self) -> None:
        with self._changed:
            if self._owner is None and not self._queue:
                self._owner = threading.get_ident()
                return
            ticket = object()
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._owner is None and self._queue[0] is ticket)
                self._owner = threading.get_ident()
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self._owner = None
            if self._queue:
                self._changed.notify_all()
