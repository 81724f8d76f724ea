"""Which sequences run in a step, on which pages: first come, first served.

Sequences that decode come first: each gets a page when it needs one, or a few steps before, while many are free. If
none is free, the newest sequence with pages is preempted: it gives its pages up, and is computed again later, from its
tokens. Prefill takes what is left of the step's token budget, the oldest sequence first. A waiting sequence is admitted
when there are pages for its text and one more token, and a step later if this step computes a page that it can share.
So the oldest sequence always advances, and each of the others does as soon as it is the oldest.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from ..kv_cache import Beginning, OutOfPages, PagedKVCache
from .prefix_cache import PrefixCache
from .sequence import Sequence, Status


@dataclass
class Batch:
    """The work of one step.

    Attributes:
        decode: sequences that draw their next token.
        prefill: (sequence, number of its next tokens) of one prefill pass; all have the same swapped kernels.
        extended: those of ``decode`` whose pages have changed.
        failed: sequences that could not begin, though all pages were free or for another reason.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    extended: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


AHEAD = 8  # steps: the device is told of the pages of several sequences at once


class Scheduler:
    """The sequences of an engine, in the order of their arrival.

    Args:
        cache: the pages.
        num_slots: the most sequences that hold pages at once.
        token_budget: the most tokens of a step, those of prefill and of decoding together.
        prefixes: the known beginnings of texts; None to share nothing.
        leave: called with a sequence that gives its pages up, to take it out of its row.

    Attributes:
        waiting, running: sequences without and with pages.
        preemptions: how often a sequence gave up its pages.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        num_slots: int,
        token_budget: int,
        prefixes: PrefixCache | None,
        leave: Callable[[Sequence], None],
    ):
        self.cache, self._leave = cache, leave
        self.num_slots, self.token_budget, self.prefixes = num_slots, token_budget, prefixes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._decoding: list[Sequence] = []  # of the last batch
        self._repeats = 0  # coming steps in which those decode on, on the pages that they have, and nothing else runs

    def add(self, sequence: Sequence) -> None:
        self._repeats = 0
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_arrival)

    def schedule(self) -> Batch:
        """Choose the work of the next step, and take the pages that it needs."""
        if self._repeats:
            self._repeats -= 1
            return Batch(self._decoding)
        batch = self._choose()
        if len(batch.decode) == len(self.running) and not self.waiting:
            self._decoding = batch.decode
            steps = min((sequence.limit - sequence.num_cached for sequence in batch.decode), default=1)
            self._repeats = steps - 1  # this one is the first
        return batch

    def _choose(self) -> Batch:
        """The work of a step that may differ from the last one."""
        batch = Batch()
        decoding = [sequence for sequence in self.running if sequence.row >= 0]
        if any(sequence.num_cached == sequence.limit < self._most(sequence) for sequence in decoding):
            batch.extended = self._extend(decoding)
        batch.decode = [one for one in decoding if one.row >= 0 and one.num_cached < one.limit]
        room, swaps = max(1, self.token_budget - len(batch.decode)), None
        for sequence in list(self.running):
            if sequence.row >= 0 or not room or (swaps is not None and sequence.swaps != swaps):
                continue
            count = min(room, sequence.num_tokens - sequence.num_cached)
            if count and self._grow(sequence, sequence.num_cached + count):
                room, swaps = room - count, sequence.swaps
                batch.prefill.append((sequence, count))
        while room and self.waiting and (swaps is None or self.waiting[0].swaps == swaps):
            sequence = self.waiting[0]
            if len(self.running) == self.num_slots or self._awaits(sequence, batch) or not self._admit(sequence, batch):
                break
            if sequence.cache_id is not None:
                count = min(room, sequence.num_tokens - sequence.num_cached)
                room, swaps = room - count, sequence.swaps
                batch.prefill.append((sequence, count))
        return batch

    def _extend(self, decoding: list[Sequence]) -> list[Sequence]:
        """Give a page to each sequence that needs one now or, while many are free, soon. Returns those that got one."""
        ahead = AHEAD if self.cache.pool.num_free > len(decoding) else 1
        return [
            sequence
            for sequence in decoding
            if sequence.row >= 0  # not preempted for an older one
            and sequence.limit < min(sequence.num_cached + ahead, self._most(sequence))
            and self._grow(sequence, sequence.limit + 1)
        ]

    def _awaits(self, sequence: Sequence, batch: Batch) -> bool:
        """Whether the step computes something that the sequence can share in the next one."""
        return self.prefixes is not None and self.prefixes.awaits(sequence, (other for other, _ in batch.prefill))

    def _most(self, sequence: Sequence) -> int:
        """The most tokens that the sequence's cache ever holds: its last token is never read."""
        return sequence.most_tokens - 1

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a sequence room for ``num_tokens`` tokens. False if it had to be preempted itself."""
        while sequence.cache_id is not None:
            try:
                self.cache.advance(sequence.cache_id, sequence.num_cached)
                self.cache.reserve(sequence.cache_id, num_tokens)
            except OutOfPages:
                self.preempt(self.running[-1])
            else:
                self._set_limit(sequence, sequence.cache_id)
                return True
        return False

    def _set_limit(self, sequence: Sequence, cache_id: int) -> None:
        sequence.limit = min(self.cache.capacity(cache_id), self._most(sequence))

    def _admit(self, sequence: Sequence, batch: Batch) -> bool:
        """Give the first waiting sequence pages for its text and one more token. False if too few are free."""
        try:
            with self.cache.device.guard("generation"):
                beginning, cache_id = self._begin(sequence)
        except Exception as error:
            if isinstance(error, OutOfPages) and self.running:
                return False
            self.waiting.remove(sequence)
            batch.failed.append((sequence, error))
            return True
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        sequence.status, sequence.cache_id = Status.RUNNING, cache_id
        sequence.num_cached = beginning.num_tokens
        self._set_limit(sequence, cache_id)
        if self.prefixes is not None:
            self.prefixes.count(sequence, beginning)
        return True

    def _begin(self, sequence: Sequence) -> tuple[Beginning, int]:
        """A sequence of the cache that begins with what is known of the text."""
        room = min(sequence.num_tokens + 1, self._most(sequence))
        if self.prefixes is None:
            return Beginning(), self.cache.begin(Beginning(), room)
        try:
            beginning = self.prefixes.find(sequence)
            return beginning, self.cache.begin(beginning, room)
        except OutOfPages:  # a copy of the last page takes one page more
            beginning = self.prefixes.find(sequence, copying=False)
            return beginning, self.cache.begin(beginning, room)

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages away. It waits, and its tokens are read again later."""
        self.release(sequence)
        self.preemptions += 1
        sequence.preemptions += 1
        self.add(sequence)

    def make_room(self, num_pages: int) -> None:
        """Preempt the newest sequences until so many pages are free, or none holds any."""
        while self.running and self.cache.pool.num_free < num_pages:
            self.preempt(self.running[-1])

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, with its pages and its row."""
        self._repeats = 0
        if sequence.cache_id is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if self.prefixes is not None and sequence.error is None:
            self.prefixes.insert(sequence)
        self.cache.free(sequence.cache_id)
        sequence.cache_id, sequence.num_cached, sequence.limit = None, 0, 0
        sequence.life += 1
        self._leave(sequence)

    def close(self) -> None:
        """Release the cache."""
        if "cache" in self.__dict__:
            self.cache.pool.keep_for(lambda page: None)
        for name in ("cache", "prefixes"):
            self.__dict__.pop(name, None)


def _arrival(sequence: Sequence) -> int:
    return sequence.number
