"""Keys and values in pages: each layer has a pool of equal pages, and each sequence a list of the pages it holds.

    slot of token t = pages[t // page_size] * page_size + t % page_size

Pages have reference counts, so that sequences can share a common beginning: ``fork`` shares every page, and the first
append to a shared page copies it (copy on write). A page that nobody holds is free. It may keep its contents until it
is taken again, so that a later sequence can ``begin`` with it. If every layer has a sliding window, a sequence releases
each page that has left all windows. All of this is on the host; kernels read block tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import RooflamaError, copy_pages

if TYPE_CHECKING:
    from rooflama.loaders.device import Device

    from .config import ModelConfig


class OutOfPages(RooflamaError, MemoryError):
    """The page pool has too few free pages. Nothing was changed."""


class SequenceError(RooflamaError, KeyError):
    """A sequence id that the cache does not hold."""

    __str__ = Exception.__str__


class PagePool:
    """The free pages among ``num_pages``, and for each other page the number of sequences that hold it.

    Attributes:
        references: of each page.
        kept: pages whose contents someone may ask for again, held or free. Free ones are taken last, the least recently
            used first.
        on_taken: called with a page of ``kept`` whose contents are lost because it is taken.
    """

    def __init__(self, num_pages: int):
        self.references = [0] * num_pages
        self.kept: set[int] = set()
        self.on_taken: Callable[[int], object] = lambda page: None
        self._empty = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # free pages of ``kept``, the least recently used first

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def take(self, count: int) -> list[int]:
        self.require(count)
        pages = []
        for _ in range(count):
            if self._empty:
                pages.append(self._empty.pop())
                continue
            pages.append(next(iter(self._idle)))
            del self._idle[pages[-1]]
            self.kept.discard(pages[-1])
            self.on_taken(pages[-1])
        for page in pages:
            self.references[page] = 1
        return pages

    def require(self, count: int, *, besides: int = 0) -> None:
        """Raise OutOfPages unless ``count`` pages are free besides some that are spoken for."""
        if count > self.num_free - besides:
            raise OutOfPages(
                f"{count} pages needed, {self.num_free - besides} of {len(self.references)} free",
                rule="a sequence's pages all come from one pool",
                remedy="Free a sequence, or load the model with a larger max_context",
            )

    def share(self, page: int) -> None:
        if self.references[page] == 0:
            del self._idle[page]
        self.references[page] += 1

    def give_back(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self.kept:
                self._idle[page] = None
            else:
                self._empty.append(page)

    def keep_for(self, on_taken: Callable[[int], object]) -> None:
        """Forget all contents that are kept, and keep others from now on."""
        self.on_taken = on_taken
        self._empty += self._idle
        self._idle.clear()
        self.kept.clear()


@dataclass
class _Sequence:
    pages: list[int] = field(default_factory=list)  # those from page ``released`` of the sequence on
    released: int = 0  # pages that have left all windows
    length: int = 0  # tokens written or about to be


class Beginning(NamedTuple):
    """Tokens that a new sequence need not compute: ``pages`` hold those from page ``first`` up to ``num_tokens``."""

    first: int = 0
    pages: tuple[int, ...] = ()
    num_tokens: int = 0


def ring_pages(config: ModelConfig, page_size: int, max_append: int) -> int:
    """The most pages that a sequence of any length holds; sys.maxsize if some layer sees every key.

    While ``max_append`` tokens are written, the oldest of them must still see window - 1 tokens before it.
    """
    if not all(config.sliding_windows):
        return sys.maxsize
    return -(-(max(config.sliding_windows) - 1 + max_append) // page_size) + 1


def is_scaled(kv_dtype: torch.dtype) -> bool:
    """Whether keys and values are stored as codes with a float32 scale: int8 and fp8."""
    return kv_dtype.itemsize == 1


class PagedKVCache:
    """The page pools of all layers on one device, and the sequences in them.

    Args:
        config: gives num_layers, num_kv_heads, head_dim.
        num_pages: pages in each layer's pool.
        page_size: tokens per page, a power of two.
        max_append: the most tokens that one ``append`` adds.
        dtype: of the pages; ``torch.int8`` and ``torch.float8_e4m3fn`` add a float32 scale per token and head.
        device: allocates the memory, and frees it when it is closed.

    Raises:
        DeviceOutOfMemory: the pools do not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        max_append: int,
        dtype: torch.dtype,
        device: Device,
    ):
        self.device = device
        self.page_size = page_size
        self.max_append = max_append
        self.ring = ring_pages(config, page_size, max_append)
        self.window = max(config.sliding_windows) if all(config.sliding_windows) else None  # keys that some layer sees
        self.pool = PagePool(num_pages)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)

        def pages(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [device.allocate(shape, dtype, label=f"{label} of layer {i}").tensor for i in layers]

        self.k_pages = pages("keys", shape, dtype)
        self.v_pages = pages("values", shape, dtype)
        self.k_scale: list[Tensor | None] = [None for _ in layers]
        self.v_scale: list[Tensor | None] = [None for _ in layers]
        if is_scaled(dtype):
            self.k_scale = [*pages("key scales", shape[:3], torch.float32)]
            self.v_scale = [*pages("value scales", shape[:3], torch.float32)]

    def pages_for(self, num_tokens: int) -> int:
        """The most pages that a sequence of ``num_tokens`` tokens holds at once."""
        return min(-(-num_tokens // self.page_size), self.ring)

    def _sequence(self, sequence_id: int) -> _Sequence:
        if sequence_id not in self._sequences:
            raise SequenceError(
                f"sequence {sequence_id}",
                rule="a sequence exists from add or fork until free",
                remedy="Use the id that add or fork returned",
            )
        return self._sequences[sequence_id]

    def length(self, sequence_id: int) -> int:
        return self._sequence(sequence_id).length

    def pages(self, sequence_id: int) -> tuple[int, ...]:
        return tuple(self._sequence(sequence_id).pages)

    def page_at(self, sequence_id: int, index: int) -> int:
        """The page that holds the tokens from ``index * page_size`` on."""
        sequence = self._sequence(sequence_id)
        return sequence.pages[index - sequence.released]

    def released(self, sequence_id: int) -> int:
        """How many of the sequence's first pages have left all windows; ``pages`` begins after them."""
        return self._sequence(sequence_id).released

    def add(self) -> int:
        """Make an empty sequence, and return its id."""
        self._next_id += 1
        self._sequences[self._next_id] = _Sequence()
        return self._next_id

    def begin(self, beginning: Beginning, num_tokens: int) -> int:
        """Make a sequence that has some tokens already, with room for ``num_tokens``, and return its id.

        Full pages are shared. A last page with room is copied, since the sequence will write to it. Raises OutOfPages,
        before anything is changed.
        """
        first, pages, length = beginning
        whole = pages[: length // self.page_size - first] if length else ()
        missing = min(-(-num_tokens // self.page_size), first + self.ring) - first - len(whole)
        self.pool.require(missing, besides=sum(self.pool.references[page] == 0 for page in pages))
        for page in pages:
            self.pool.share(page)
        sequence_id = self.add()
        sequence = self._sequences[sequence_id] = _Sequence([*pages], first, length)
        try:
            if len(whole) < len(pages):
                self._unshare(sequence, [len(pages) - 1], self.pool.take(1))
            self.reserve(sequence_id, num_tokens)
        except BaseException:
            self.free(sequence_id)
            raise
        return sequence_id

    def reserve(self, sequence_id: int, num_tokens: int) -> None:
        """Take pages until there is room for ``num_tokens`` tokens, or for all that a window sees.

        Raises OutOfPages, before anything is changed.
        """
        sequence = self._sequence(sequence_id)
        last = min(-(-num_tokens // self.page_size), sequence.released + self.ring)
        missing = last - sequence.released - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.pool.take(missing)

    def capacity(self, sequence_id: int) -> int:
        """The number of tokens that the sequence's pages have room for, released ones included."""
        sequence = self._sequence(sequence_id)
        return (sequence.released + len(sequence.pages)) * self.page_size

    def advance(self, sequence_id: int, num_tokens: int) -> None:
        """Note that the sequence has ``num_tokens`` tokens. Pages that no later token sees are released."""
        sequence = self._sequence(sequence_id)
        past = self._past(sequence, num_tokens)
        for page in past:
            self.pool.give_back(page)
        del sequence.pages[: len(past)]
        sequence.released += len(past)
        sequence.length = num_tokens

    def _past(self, sequence: _Sequence, num_tokens: int) -> list[int]:
        """The pages that no token from ``num_tokens`` on sees."""
        if self.window is None:
            return []
        return sequence.pages[: max(0, max(0, num_tokens - self.window + 1) // self.page_size - sequence.released)]

    def append(self, sequence_id: int, num_tokens: int) -> np.ndarray:
        """Make room for the next ``num_tokens`` tokens, and return their slots, int64 [num_tokens].

        Shared pages that these tokens are written to are copied first. Raises OutOfPages.
        """
        if num_tokens > self.max_append:
            raise OutOfPages(
                f"{num_tokens} tokens appended at once",
                rule=f"this cache was made for at most {self.max_append}",
                remedy="Append in parts, or make the cache with a larger max_append",
            )
        sequence = self._sequence(sequence_id)
        start, end = sequence.length, sequence.length + num_tokens
        held = sequence.released + len(sequence.pages)
        touched = range(start // self.page_size, min(held, -(-end // self.page_size)))
        shared = [i for i in touched if self.pool.references[sequence.pages[i - sequence.released]] > 1]
        missing = max(0, -(-end // self.page_size) - held)
        past = self._past(sequence, start)
        self.pool.require(len(shared) + missing, besides=-sum(self.pool.references[page] == 1 for page in past))
        self.advance(sequence_id, start)
        fresh = self.pool.take(len(shared) + missing)
        shared = [i - sequence.released for i in shared]
        sequence.pages += fresh[len(shared) :]
        self._unshare(sequence, shared, fresh[: len(shared)])
        sequence.length = end
        positions = np.arange(start, end)
        pages = np.asarray(sequence.pages, dtype=np.int64)
        return pages[positions // self.page_size - sequence.released] * self.page_size + positions % self.page_size

    def _unshare(self, sequence: _Sequence, indices: list[int], copies: list[int]) -> None:
        """Copy the sequence's pages at ``indices`` to ``copies``, which it holds from then on."""
        if not indices:
            return
        originals = [sequence.pages[i] for i in indices]
        try:
            for pools in (self.k_pages, self.v_pages, self.k_scale, self.v_scale):
                for pool in pools:
                    if pool is not None:
                        source, target = (
                            torch.tensor(p, dtype=torch.int64, device=pool.device) for p in (originals, copies)
                        )
                        copy_pages(pool, source, target)
        except BaseException:
            for page in copies:
                self.pool.give_back(page)
            raise
        for i, original, copy in zip(indices, originals, copies, strict=True):
            sequence.pages[i] = copy
            self.pool.give_back(original)

    def fork(self, sequence_id: int) -> int:
        """Make a sequence with the same tokens and pages, and return its id. The first of the two to write copies."""
        original = self._sequence(sequence_id)
        held = original.pages[: -(-original.length // self.page_size) - original.released]
        for page in held:
            self.pool.share(page)
        self._next_id += 1
        self._sequences[self._next_id] = _Sequence(list(held), original.released, original.length)
        return self._next_id

    def free(self, sequence_id: int) -> None:
        """Give the sequence's pages back; its id is invalid afterwards."""
        for page in reversed(self._sequence(sequence_id).pages):  # so that the last ones are taken first
            self.pool.give_back(page)
        del self._sequences[sequence_id]

    def block_table(self, sequence_ids: list[int], width: int) -> Tensor:
        """int32 [num_seqs, width] on the host. Entries without a page are 0; no kernel reads them."""
        table = torch.zeros(len(sequence_ids), width, dtype=torch.int32)
        for row, sequence_id in enumerate(sequence_ids):
            sequence = self._sequence(sequence_id)
            places = table[row, sequence.released :]
            pages = torch.tensor(sequence.pages[: len(places)], dtype=torch.int32)
            places[: len(pages)] = pages
        return table
