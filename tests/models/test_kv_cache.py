"""The page pool as a state machine: whatever is added, appended, forked and freed, no token is lost or shared wrongly."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from rooflama.kernels import use_backend
from rooflama.loaders.device import open_device
from rooflama.models import ModelConfig, OutOfPages, PagedKVCache, RopeSpec

PAGE_SIZE = 16
NUM_PAGES = 12


def tiny_config(num_layers=2):
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
        sliding_windows=(0,) * num_layers,
        tied_embeddings=True,
    )


class CacheMachine(RuleBasedStateMachine):
    """Writes a fresh number for every appended token and remembers what each sequence must read back."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.device = open_device("cpu")
        self.cache = PagedKVCache(
            tiny_config(), num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float32, device=self.device
        )
        self.expected: dict[int, list[float]] = {}
        self.counter = 0

    @rule(target=sequences)
    def add(self):
        sequence = self.cache.add()
        self.expected[sequence] = []
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(1, 40))
    def append(self, sequence, num_tokens):
        before = (self.cache.length(sequence), self.cache.pages(sequence), self.cache.pool.num_free)
        try:
            with use_backend("numpy"):
                slots = self.cache.append(sequence, num_tokens)
        except OutOfPages:
            assert before == (self.cache.length(sequence), self.cache.pages(sequence), self.cache.pool.num_free)
            return
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
        return copy

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.expected[sequence]

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        for sequence, values in self.expected.items():
            assert self.cache.length(sequence) == len(values)
            positions = np.arange(len(values))
            pages = np.asarray(self.cache.pages(sequence), dtype=np.int64)
            slots = pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            for layer, pool in enumerate((*self.cache.k_pages, *self.cache.v_pages)):
                read = pool.view(-1, *pool.shape[2:])[torch.from_numpy(slots)]
                assert (read == torch.tensor(values).view(-1, 1, 1) + layer * 1e5).all()

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


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def test_running_out_names_the_numbers():
    with open_device("cpu") as device:
        cache = PagedKVCache(tiny_config(), num_pages=2, page_size=16, dtype=torch.float16, device=device)
        sequence = cache.add()
        with pytest.raises(OutOfPages, match="3 pages asked, 2 of 2 free"):
            cache.append(sequence, 33)
        assert len(cache.append(sequence, 32)) == 32


def test_quantised_pages_carry_scales():
    with open_device("cpu") as device:
        cache = PagedKVCache(tiny_config(), num_pages=2, page_size=16, dtype=torch.int8, device=device)
        assert cache.k_scale[0].shape == (2, 16, 1)
        assert cache.k_scale[0].dtype == torch.float32
