"""Beginnings of texts whose keys and values are in pages already, so that later sequences share them.

A page's identity is a chain of hashes: of its tokens, of the page before it, and at the root of everything else that
changes keys and values. A page that a sequence has filled is known by its identity; a last page that is partly filled,
by its predecessor's and its tokens. A sequence begins with the longest chain of known pages that its tokens match, and
with a copy of one page more that matches in part.

Pages stay known while sequences hold them, and afterwards until the pool takes them for something else: the page that
was used longest ago is taken first.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..kv_cache import Beginning
from .runner import ModelRunner
from .sequence import Sequence

TOKEN_BYTES = 4  # token ids are packed as int32


class _Page(NamedTuple):
    """What a known page holds: ``tokens`` after the chain ``parent``. ``identity`` is None if it is not full."""

    parent: bytes
    tokens: bytes
    identity: bytes | None


@dataclass
class PrefixStatistics:
    """Counts since the engine began.

    Attributes:
        lookups, hits: sequences that took pages, and those that found a part of their text.
        tokens_asked, tokens_saved: of their texts, and how many of these were found.
        pages_taken: known pages that the pool took for something else.
    """

    lookups: int = 0
    hits: int = 0
    tokens_asked: int = 0
    tokens_saved: int = 0
    pages_taken: int = 0


class PrefixCache:
    """The pages of a runner's cache whose contents are known.

    Sequences under swapped kernels take no part. The newest of several prefix caches of one page cache is the one in
    use; the others find nothing.

    Attributes:
        statistics: of its use.
    """

    def __init__(self, runner: ModelRunner):
        self._cache, self._max_context = runner.cache, runner.max_context
        self._identity = functools.cache(runner.identity)
        self._page_bytes = self._cache.page_size * TOKEN_BYTES
        self._least = self._cache.page_size // 8 * TOKEN_BYTES  # to copy a page for less is not worth it
        self._known: dict[int, _Page] = {}
        self._full: dict[bytes, int] = {}  # identity -> page
        self._after: dict[tuple[bytes, bytes], set[int]] = {}  # (chain before it, its first token) -> pages
        self.statistics = PrefixStatistics()
        self._cache.pool.keep_for(self._taken)

    def _root(self, sequence: Sequence) -> bytes:
        """What changes keys and values besides tokens."""
        return self._identity(sequence.request.planned_tokens(self._max_context))

    def _serves(self, sequence: Sequence) -> bool:
        return not sequence.swaps and self._cache.pool.on_taken == self._taken

    def find(self, sequence: Sequence, *, copying: bool = True) -> Beginning:
        """The longest beginning of a sequence's text that is in pages. At least its last token is left to compute.

        ``copying=False`` leaves out a last page of which only a part matches.
        """
        if not self._serves(sequence):
            return Beginning()
        return self._longest(self._root(sequence), sequence.packed(sequence.num_tokens - 1), copying)

    def awaits(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        """Whether one of ``others``, whose texts are about to be computed, will make a page more of its text known."""
        if not self._serves(sequence):
            return False
        text = sequence.packed(sequence.num_tokens - 1)
        known = self.find(sequence).num_tokens * TOKEN_BYTES
        return any(
            _common(text, other.packed(other.num_tokens)) >= known + self._page_bytes
            and self._root(other) == self._root(sequence)
            for other in others
        )

    def count(self, sequence: Sequence, beginning: Beginning) -> None:
        """Note that a sequence took pages, and what it began with."""
        self.statistics.lookups += 1
        self.statistics.hits += beginning.num_tokens > 0
        self.statistics.tokens_asked += sequence.num_tokens
        self.statistics.tokens_saved += beginning.num_tokens
        if sequence.life == 0:
            sequence.cached_tokens = beginning.num_tokens

    def _longest(self, root: bytes, tokens: bytes, copying: bool) -> Beginning:
        size, window = self._page_bytes, self._cache.window
        chains, pages = [root], list[int | None]()
        for start in range(0, len(tokens) - size + 1, size):
            chains.append(_chained(chains[-1], tokens[start : start + size]))
            pages.append(self._full.get(chains[-1]))
            if window is None and pages[-1] is None:
                del pages[-1]
                break
        for count in range(len(pages), -1, -1):
            page, matched = self._partial(chains[count], tokens[count * size : (count + 1) * size])
            tails: list[tuple[tuple[int, ...], int]] = [((), 0)]
            if copying and page is not None:
                tails.insert(0, ((page,), matched // TOKEN_BYTES))
            for tail, more in tails:
                length = count * self._cache.page_size + more
                first = 0 if window is None else min(count, max(0, length - window + 1) // self._cache.page_size)
                held = tuple(page for page in pages[first:count] if page is not None)
                if len(held) == count - first:
                    return Beginning(first, (*held, *tail), length)
        raise AssertionError("a beginning of no tokens is always there")

    def _partial(self, chain: bytes, tokens: bytes) -> tuple[int | None, int]:
        """The page after ``chain`` with the most bytes in common with ``tokens``, and how many."""
        best, most = None, self._least - 1
        for page in self._after.get((chain, tokens[:TOKEN_BYTES]), ()):
            if (matched := _common(self._known[page].tokens, tokens)) > most:
                best, most = page, matched
        return best, most

    def insert(self, sequence: Sequence) -> None:
        """Make known the pages of a sequence, as far as its tokens are in them."""
        if sequence.cache_id is None or not self._serves(sequence):
            return
        pages, first = self._cache.pages(sequence.cache_id), self._cache.released(sequence.cache_id)
        tokens = sequence.packed(min(sequence.num_cached, sequence.num_tokens))
        chain = self._root(sequence)
        for start in range(0, len(tokens), self._page_bytes):
            part = tokens[start : start + self._page_bytes]
            identity = _chained(chain, part) if len(part) == self._page_bytes else None
            index = start // self._page_bytes - first
            if index >= 0:
                self._insert(pages[index], _Page(chain, part, identity))
            chain = identity or chain

    def _insert(self, page: int, holds: _Page) -> None:
        known = self._known.get(page)
        if known == holds or (holds.identity is not None and holds.identity in self._full):
            return
        if holds.identity is None:
            most = self._partial(holds.parent, holds.tokens)[1]
            if len(holds.tokens) < self._least or most == len(holds.tokens):
                return  # too little, or no more than another page has
        if known is not None:
            self._drop(page)
        self._known[page] = holds
        self._after.setdefault((holds.parent, holds.tokens[:TOKEN_BYTES]), set()).add(page)
        if holds.identity is not None:
            self._full[holds.identity] = page
        self._cache.pool.kept.add(page)

    def _taken(self, page: int) -> None:
        self.statistics.pages_taken += 1
        self._drop(page)

    def _drop(self, page: int) -> None:
        parent, tokens, identity = self._known.pop(page)
        siblings = self._after[parent, tokens[:TOKEN_BYTES]]
        siblings.discard(page)
        if not siblings:
            del self._after[parent, tokens[:TOKEN_BYTES]]
        if identity is not None:
            del self._full[identity]

    def forget(self) -> None:
        """Know no page any more. Call it after changing the weights of a loaded model."""
        for known in (self._known, self._full, self._after):
            known.clear()
        self._cache.pool.keep_for(self._taken)


def _chained(chain: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(chain + tokens, digest_size=16).digest()


def _common(one: bytes, other: bytes) -> int:
    """The number of bytes of the tokens with which both begin."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    equal = bisect_left(range(length), True, key=lambda end: one[: end + 1] != other[: end + 1])
    return equal // TOKEN_BYTES * TOKEN_BYTES
