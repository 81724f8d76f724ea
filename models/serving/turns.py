"""Several requests on one model: one computes at a time, and pages go round.

A step of a run is a turn; turns are taken in the order in which threads ask for them, so runs whose pages fit beside
each other advance together, token by token. A run that finds too few free pages waits for the others. A run that is
idle, because whoever reads it does not ask for its next token, stands in nobody's way: after ``PATIENCE_S``, or at once
if the thread that read it last is the one that asks now, it gives its pages up, and reads its text again when it is
asked to go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

PATIENCE_S = 0.25


class Holder(Protocol):
    """What may hold pages."""

    def suspend(self) -> None:
        """Give all pages back, to go on later. Called within a turn."""


class Turns:
    """The turns of one model's users."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None  # the thread whose turn it is
        self._depth = 0
        self._holders: dict[Holder, tuple[int, float] | None] = {}  # idle: thread and time of last use; busy: None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute alone. A thread may begin a turn within its own."""
        if self._owner != threading.get_ident():
            self._join()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    def hold(self, holder: Holder) -> None:
        """``holder`` holds pages from now on, and uses them."""
        self._holders[holder] = None

    def rest(self, holder: Holder) -> None:
        """``holder``, if it holds pages, does not use them now."""
        if holder in self._holders:
            self._holders[holder] = (threading.get_ident(), time.monotonic())

    def wake(self, holder: Holder) -> None:
        """``holder``, if it holds pages, asks for a turn to use them."""
        if holder in self._holders:
            self._holders[holder] = None

    def drop(self, holder: Holder) -> None:
        """``holder`` holds no pages."""
        self._holders.pop(holder, None)

    def make_room(self, enough: Callable[[], bool]) -> bool:
        """Within a turn: let others go on, or suspend them, until there is enough. False if that cannot help.

        Others may have had turns in between: look again at whatever they change.
        """
        while not enough():
            if self.suspend_idle():
                continue
            if not self._holders or self._depth > 1:
                return False
            self._pause()
        return True

    def suspend_idle(self) -> bool:
        """Make one idle holder give its pages up, of this thread's before others; False if there is none."""
        me, now = threading.get_ident(), time.monotonic()
        idle = [(holder, *used) for holder, used in list(self._holders.items()) if used is not None]
        mine = [holder for holder, thread, _ in idle if thread == me]
        old = [holder for holder, _, since in idle if now - since > PATIENCE_S]
        for holder in (mine + old)[:1]:
            self.drop(holder)
            holder.suspend()
            return True
        return False

    def _pause(self) -> None:
        """Let others have turns until something may have changed."""
        self._depth = 0
        self._leave()
        try:
            with self._changed:
                self._changed.wait(PATIENCE_S)
        finally:
            self._join()
            self._depth = 1

    def _join(self) -> None:
        ticket = object()
        with self._changed:
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
            self._changed.notify_all()
