"""The page pool as a state machine: whatever is added, appended, forked and freed, every token is read back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rooflama.kernels import use_backend
from rooflama.loaders.device import open_device
from rooflama.models import ModelConfig, OutOfPages, PagedKVCache, RopeSpec
from rooflama.models.kv_cache import ring_pages

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
    """Writes a fresh number for every appended token and remembers what each sequence must read back."""

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
        self.oldest: dict[int, int] = {}  # the first position that the last append could see
        self.counter = 0

    @rule(target=sequences)
    def add(self):
        sequence = self.cache.add()
        self.expected[sequence] = []
        self.oldest[sequence] = 0
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(1, MAX_APPEND))
    def append(self, sequence, num_tokens):
        before = (self.cache.length(sequence), self.cache.pages(sequence), self.cache.pool.num_free)
        try:
            with use_backend("numpy"):
                slots = self.cache.append(sequence, num_tokens)
        except OutOfPages:
            assert before == (self.cache.length(sequence), self.cache.pages(sequence), self.cache.pool.num_free)
            return
        self.oldest[sequence] = max(0, before[0] - self.window + 1) if self.window else 0
        values = [float(self.counter + i) for i in range(num_tokens)]
        self.counter += num_tokens
        for layer, pool in enumerate((*self.cache.k_pages, *self.cache.v_pages)):
            flat = pool.view(-1, *pool.shape[2:])
            flat[torch.from_numpy(slots)] = torch.tensor(values).view(-1, 1, 1) + layer * 1e5
        self.expected[sequence] += values

    @rule(sequence=sequences, num_tokens=st.integers(0, 60))
    def reserve(self, sequence, num_tokens):
        free = self.cache.pool.num_free
        try:
            self.cache.reserve(sequence, num_tokens)
        except OutOfPages:
            assert self.cache.pool.num_free == free

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

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        """Through the block table, as the kernels do; with a window, what the last append's first token still sees."""
        for sequence, values in self.expected.items():
            assert self.cache.length(sequence) == len(values)
            visible = np.arange(self.oldest[sequence], len(values))
            width = -(-max(len(values), 1) // PAGE_SIZE)
            pages = self.cache.block_table([sequence], width)[0].numpy().astype(np.int64)
            slots = pages[visible // PAGE_SIZE] * PAGE_SIZE + visible % PAGE_SIZE
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
    """Every layer has a window: a sequence's pages form a ring, and it may grow for ever."""

    window = 24


machine_settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
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
        assert len(cache.pages(sequence)) == 4


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
