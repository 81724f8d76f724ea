"""Prompt passes: cut into chunks, and padded to the sizes of captured graphs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rooflama
from rooflama.kernels import embedding, use_backend
from rooflama.kernels import kernel as kernel_module
from rooflama.models.serving import passes
from rooflama.models.serving import runner as runner_module
from rooflama.models.serving.passes import SIZES, CapturedPasses, captured_sizes, chunks, padded
from small_checkpoint import write_small

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)


class Replaying:
    """A device whose graphs run their work again, as a GPU would; ``captured`` counts them."""

    kind, torch_device = "cpu", torch.device("cpu")

    def __init__(self):
        self.captured = 0

    def capture(self, work, memory_pool):
        self.captured += 1
        self.replay = work
        return self


@given(lengths=LENGTHS, limit=st.integers(1, 50))
def test_chunks_cover_every_token_once(lengths, limit):
    cut = list(chunks(lengths, limit))
    assert all(sum(span.num_tokens for span in chunk) == limit for chunk in cut[:-1])
    assert [(span.index, token) for chunk in cut for span in chunk for token in range(span.start, span.end)] == [
        (index, token) for index, length in enumerate(lengths) for token in range(length)
    ]


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_small(tmp_path_factory.mktemp("passes") / "small.gguf", {"llama.context_length": 512})
    with use_backend("numpy"), rooflama.load(path, device="cpu", progress=False) as model:
        yield model


def prefill(model, prompts, captured, observe=None):
    """The residual stream and the first page of each prompt; passes run by ``captured`` if it is not None."""
    runner = model.runner
    for pages in (*runner.cache.k_pages, *runner.cache.v_pages):
        pages.zero_()
    ids = [runner.cache.add() for _ in prompts]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_captured", captured)
            patch.setattr(runner_module, "replays", lambda device: captured is not None)
            passes = runner.prefill(ids, prompts, [len(prompt) for prompt in prompts], observe)
            hidden = [part.clone() for _, part in passes]
        first_pages = runner.cache.block_table(ids, 1)[:, 0].long()  # holds each of these prompts
        return torch.cat(hidden), torch.stack([pages[first_pages] for pages in runner.cache.k_pages])
    finally:
        for sequence_id in ids:
            runner.cache.free(sequence_id)


@pytest.mark.parametrize("lengths", [[1], [8], [9], [3, 5, 2], [20, 1, 30]])
def test_padded_passes_are_the_plain_ones(model, lengths):
    """First, captured and replayed passes, after one that left other tokens in the same memory."""
    prompts = [[7 + 3 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    want = prefill(model, prompts, None)
    device = Replaying()
    captured = CapturedPasses(device, SIZES)
    prefill(model, [[11] * padded(sum(lengths), SIZES)], captured)
    for _ in range(3):
        for got, expected in zip(prefill(model, prompts, captured), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert device.captured == 1


def test_large_passes_and_many_sequences_are_not_captured(model, monkeypatch):
    monkeypatch.setattr(passes, "MOST_SEQUENCES", 2)
    captured = CapturedPasses(Replaying(), (2, 4))
    for prompts in ([[5] * 5], [[5], [6], [7]]):
        for got, want in zip(prefill(model, prompts, captured), prefill(model, prompts, None), strict=True):
            assert torch.equal(got, want)
    assert not captured._graphs


def test_swapped_and_observed_passes_are_not_captured(model):
    captured, called = CapturedPasses(Replaying(), SIZES), []

    def mine(*arguments):
        called.append("embedding")
        return embedding(*arguments)

    with rooflama.swap(embedding=mine):
        prefill(model, [[5] * 3], captured)
    prefill(model, [[5] * 3], captured, lambda name, layer, tensor: called.append(name))
    assert called[0] == "embedding"
    assert "hidden" in called
    assert not captured._graphs


def test_larger_models_capture_smaller_passes(model):
    sizes = [captured_sizes(replace(model.config, intermediate_size=width)) for width in (128, 1 << 22, 1 << 40)]
    assert sizes[0] == SIZES
    assert SIZES[0] < sizes[1][-1] < SIZES[-1]
    assert sizes[2] == SIZES[:1]


def test_a_gpu_that_runs_definitions_captures_nothing(monkeypatch):
    """Definitions compute on the host, which a graph cannot hold: ``ROOFLAMA_BACKEND=numpy`` on a GPU."""
    monkeypatch.setattr(kernel_module, "INTERPRETED", False)
    with use_backend("triton"):
        assert kernel_module.replays(torch.device("cuda"))
    with use_backend("numpy"):
        assert not kernel_module.replays(torch.device("cuda"))
