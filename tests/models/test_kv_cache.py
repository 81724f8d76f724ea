"""The page pool as a state machine: whatever is added, appended, forked and freed, every token is read back."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from rooflama.kernels import use_backend
from rooflama.loaders.device import open_device
from rooflama.models import ModelConfig, OutOfPages, PagedKVCache, RopeSpec
from rooflama.models.kv_cache import Beginning, ring_pages

PAGE_SIZE = 16
NUM_PAGES = 12
MAX_APPEND = 40


def tiny_config(num_layers=2, window=0):
    return ModelConfig(
        architecture="llama",
        name="tiny",
        num_layers=num_layers,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=8,
        context_length=128,
        rms_norm_eps=1e-5,
        softmax_scale=1.0,
        rope=RopeSpec(head_dim=8, rotary_dim=8),
        sliding_windows=(window,) * num_layers,
        tied_embeddings=True,
    )


class CacheMachine(RuleBasedStateMachine):
    """Writes a fresh number for every token and remembers, in a dictionary, what each sequence must read back.

    A sequence that is freed may leave its pages behind, with their contents: a later one begins with them, unless they
    were taken meanwhile. So is one that is preempted.
    """

    sequences = Bundle("sequences")
    window = 0

    def __init__(self):
        super().__init__()
        self.device = open_device("cpu")
        self.cache = PagedKVCache(
            tiny_config(window=self.window),
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            max_append=MAX_APPEND,
            dtype=torch.float32,
            device=self.device,
        )
        self.expected: dict[int, list[float]] = {}
        self.oldest: dict[int, int] = {}  # the first position that must still be there
        self.left: list[tuple[list[float], int, tuple[int, ...]]] = []  # values, first page, pages
        self.counter = 0
        self.cache.pool.keep_for(self.taken)

    def taken(self, page):
        self.left = [entry for entry in self.left if page not in entry[2]]

    def state(self, sequence=None):
        known = None if sequence is None else (self.cache.length(sequence), self.cache.pages(sequence))
        return known, list(self.cache.pool.references), self.cache.pool.num_free, list(self.left)

    def write(self, sequence, slots):
        values = [float(self.counter + i) for i in range(len(slots))]
        self.counter += len(slots)
        for layer, pool in enumerate((*self.cache.k_pages, *self.cache.v_pages)):
            flat = pool.view(-1, *pool.shape[2:])
            flat[torch.from_numpy(slots)] = torch.tensor(values).view(-1, 1, 1) + layer * 1e5
        self.expected[sequence] += values

    def first_seen(self, length):
        """Of the token at position ``length``."""
        return max(0, length - self.window + 1) if self.window else 0

    @rule(target=sequences)
    def add(self):
        sequence = self.cache.add()
        self.expected[sequence] = []
        self.oldest[sequence] = 0
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(1, MAX_APPEND))
    def append(self, sequence, num_tokens):
        before, length = self.state(sequence), self.cache.length(sequence)
        try:
            with use_backend("numpy"):
                slots = self.cache.append(sequence, num_tokens)
        except OutOfPages:
            assert self.state(sequence) == before
            return
        self.oldest[sequence] = self.first_seen(length)
        self.write(sequence, slots)

    @rule(sequence=sequences)
    def decode(self, sequence):
        """A token whose slot is computed from the block table, as a captured step does."""
        length = self.cache.length(sequence)
        self.cache.advance(sequence, length)
        self.oldest[sequence] = self.first_seen(length)
        before = self.state(sequence)
        try:
            self.cache.reserve(sequence, length + 1)
        except OutOfPages:
            assert self.state(sequence) == before
            return
        page = self.cache.block_table([sequence], length // PAGE_SIZE + 1)[0, -1].item()
        if self.cache.pool.references[page] == 1:  # else it was forked, which decoding does not undo
            self.write(sequence, np.array([page * PAGE_SIZE + length % PAGE_SIZE]))
            self.cache.advance(sequence, length + 1)
            self.oldest[sequence] = self.first_seen(length + 1)

    @rule(sequence=sequences, num_tokens=st.integers(0, 60))
    def reserve(self, sequence, num_tokens):
        before = self.state(sequence)
        try:
            self.cache.reserve(sequence, num_tokens)
        except OutOfPages:
            assert self.state(sequence) == before
        else:
            wanted = min(num_tokens, (self.cache.released(sequence) + self.cache.ring) * PAGE_SIZE)
            assert self.cache.capacity(sequence) >= wanted

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        copy = self.cache.fork(sequence)
        self.expected[copy] = list(self.expected[sequence])
        self.oldest[copy] = self.oldest[sequence]
        return copy

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.expected[sequence]

    @rule(sequence=consumes(sequences))
    def leave(self, sequence):
        """Free a sequence whose pages keep their contents."""
        values, first = self.expected.pop(sequence), self.cache.released(sequence)
        pages = self.cache.pages(sequence)[: -(-len(values) // PAGE_SIZE) - first]
        if pages:
            self.left.append((values, first, pages))
            self.cache.pool.kept.update(pages)
        self.cache.free(sequence)

    @precondition(lambda self: self.left)
    @rule(target=sequences, data=st.data(), room=st.integers(0, 40))
    def begin(self, data, room):
        """A sequence with a beginning of what another has left."""
        values, first, pages = data.draw(st.sampled_from(self.left))
        least = min(len(values), first * PAGE_SIZE + (self.window or 1))
        count = data.draw(st.integers(least, len(values)))
        beginning = Beginning(first, pages[: -(-count // PAGE_SIZE) - first], count)
        before = self.state()
        try:
            with use_backend("numpy"):
                sequence = self.cache.begin(beginning, count + room)
        except OutOfPages:
            assert self.state() == before
            return multiple()
        self.expected[sequence] = values[:count]
        self.oldest[sequence] = max(first * PAGE_SIZE, self.first_seen(count))
        return sequence

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        """Through the block table, as the kernels do; with a window, what the last append's first token still sees."""
        for sequence, values in self.expected.items():
            assert self.cache.length(sequence) == len(values)
            self.assert_read(self.cache.block_table([sequence], 100)[0].numpy(), self.oldest[sequence], values)
        for values, first, pages in self.left:
            self.assert_read(np.array([0] * first + list(pages)), first * PAGE_SIZE, values)

    def assert_read(self, table, oldest, values):
        visible = np.arange(oldest, len(values))
        slots = table.astype(np.int64)[visible // PAGE_SIZE] * PAGE_SIZE + visible % PAGE_SIZE
        expected = torch.tensor(values, dtype=torch.float32)[torch.from_numpy(visible)].view(-1, 1, 1)
        for layer, pool in enumerate((*self.cache.k_pages, *self.cache.v_pages)):
            assert (pool.view(-1, *pool.shape[2:])[torch.from_numpy(slots)] == expected + layer * 1e5).all()

    @invariant()
    def a_window_bounds_the_pages(self):
        for sequence in self.expected:
            assert len(set(self.cache.pages(sequence))) == len(self.cache.pages(sequence)) <= self.cache.ring

    @invariant()
    def every_page_is_counted_once_for_each_holder(self):
        holders = [0] * NUM_PAGES
        for sequence in self.expected:
            for page in self.cache.pages(sequence):
                holders[page] += 1
        assert holders == self.cache.pool.references
        assert self.cache.pool.num_free == holders.count(0)

    def teardown(self):
        self.device.close()


class WindowedCacheMachine(CacheMachine):
    """Every layer has a window: pages that have left it are released, so that a sequence may grow for ever."""

    window = 24


deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
machine_settings = settings(max_examples=2000 if deep else 20, stateful_step_count=50 if deep else 25, deadline=None)
TestCache = CacheMachine.TestCase
TestCache.settings = machine_settings
TestWindowedCache = WindowedCacheMachine.TestCase
TestWindowedCache.settings = machine_settings


@given(window=st.integers(1, 100), max_append=st.integers(1, 100), start=st.integers(0, 500))
def test_the_ring_holds_all_that_an_append_sees(window, max_append, start):
    """No page is overwritten while the first of the new tokens still sees into it."""
    oldest = max(0, start - window + 1)
    needed = (start + max_append - 1) // PAGE_SIZE - oldest // PAGE_SIZE + 1
    assert needed <= ring_pages(tiny_config(window=window), PAGE_SIZE, max_append)


def test_a_windowed_sequence_outgrows_the_pool():
    """4,096 tokens through a window of 24 in four pages."""
    with open_device("cpu") as device:
        cache = PagedKVCache(
            tiny_config(window=24), num_pages=4, page_size=16, max_append=16, dtype=torch.float16, device=device
        )
        sequence = cache.add()
        for _ in range(256):
            slots = cache.append(sequence, 16)
            assert len(set(slots.tolist())) == 16
        assert cache.length(sequence) == 4096
        assert len(cache.pages(sequence)) == 3  # 16 new tokens and the 23 before them
        assert cache.released(sequence) == 253


def test_running_out_names_the_numbers():
    with open_device("cpu") as device:
        cache = PagedKVCache(
            tiny_config(), num_pages=2, page_size=16, max_append=64, dtype=torch.float16, device=device
        )
        sequence = cache.add()
        with pytest.raises(OutOfPages, match="3 pages needed, 2 of 2 free"):
            cache.append(sequence, 33)
        assert len(cache.append(sequence, 32)) == 32


def test_quantised_pages_carry_scales():
    with open_device("cpu") as device:
        cache = PagedKVCache(tiny_config(), num_pages=2, page_size=16, max_append=64, dtype=torch.int8, device=device)
        assert cache.k_scale[0].shape == (2, 16, 1)
        assert cache.k_scale[0].dtype == torch.float32
