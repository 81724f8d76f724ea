"""Several runs on one model: one computes at a time, and idle ones give up their pages.

One step of a run is a turn. Threads get turns in the order in which they ask, so that runs whose pages fit into the
pool together advance together, token by token. A run that finds too few free pages waits for the others. A run is idle
if nobody asks for its next token. It gives up its pages to a run that needs them: after ``PATIENCE_S``, or at once if
the same thread read it last. When it is continued, it reads its text again.
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
    """A run that may hold pages."""

    def suspend(self) -> None:
        """Give all pages back; the run can be continued later. Called within a turn."""


class Turns:
    """Hands out turns on one model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None  # the thread whose turn it is
        self._depth = 0
        self._holders: dict[Holder, tuple[int, float] | None] = {}  # idle: thread and time of last use; busy: None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn and hold it. A thread may begin a turn within its own."""
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
        """``holder`` holds pages from now on, and is busy."""
        self._holders[holder] = None

    def rest(self, holder: Holder) -> None:
        """``holder``, if it holds pages, is idle from now on."""
        if holder in self._holders:
            self._holders[holder] = (threading.get_ident(), time.monotonic())

    def wake(self, holder: Holder) -> None:
        """``holder``, if it holds pages, is busy from now on."""
        if holder in self._holders:
            self._holders[holder] = None

    def drop(self, holder: Holder) -> None:
        """``holder`` holds no pages."""
        self._holders.pop(holder, None)

    def make_room(self, enough: Callable[[], bool]) -> bool:
        """Within a turn: suspend idle holders, or let busy ones advance, until ``enough()``. False if that cannot help.

        Other threads may have had turns when this returns, so that what they change must be looked at again.
        """
        while not enough():
            if self.suspend_idle():
                continue
            if not self._holders or self._depth > 1:
                return False
            self._pause()
        return True

    def suspend_idle(self) -> bool:
        """Suspend one idle holder, this thread's own first. False if there is none."""
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
        """Give the turn to others, and take it again after a change or after ``PATIENCE_S``."""
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
