"""The demo checkpoint end to end against transformers' Llama in float32 on the same dequantised weights."""

import pytest
import torch

import rooflama
from demo_oracle import PROMPTS, checkpoint_path, greedy, transformers_llama
from rooflama.kernels import use_backend
from rooflama.kernels.launch import override

pytestmark = pytest.mark.demo_checkpoint
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def model():
    with use_backend("numpy"):
        model = rooflama.load(checkpoint_path(), device="cpu", max_context=512, progress=False)
    with model:
        yield model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuation_equals_transformers(model, numpy_backend, prompt):
    ids = model.tokenizer.encode(prompt, parse_special=True)
    expected, _ = greedy(ids, NUM_TOKENS)
    if end := [i for i, token in enumerate(expected) if token in model.tokenizer.eos_ids]:
        expected = expected[: end[0] + 1]
    assert model.generate(ids, max_new_tokens=NUM_TOKENS).token_ids == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_agree_with_transformers(model, numpy_backend, prompt):
    ids = model.tokenizer.encode(prompt, parse_special=True)
    with torch.no_grad():
        expected = transformers_llama()(torch.tensor([ids])).logits[0]
    got = model.logits(ids)
    assert got.shape == expected.shape
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= 1e-4, f"relative error {error.max():.2e} at row {int(error.argmax())}"


def test_batch_equals_one_by_one(model, numpy_backend):
    together = model.generate(PROMPTS, max_new_tokens=12)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation.token_ids == model.generate(prompt, max_new_tokens=12).token_ids


def test_interpreted_kernels_agree_with_the_definitions(model):
    """Every kernel of a full forward pass over quantised weights, under Triton's interpreter."""
    # The interpreter takes a millisecond a program: a few wide blocks of rows instead of thousands of narrow ones.
    ids = model.tokenizer.encode(PROMPTS[0])[:2]
    with use_backend("numpy"):
        expected = model.logits(ids)
    with (
        use_backend("triton"),
        override("gemv", BLOCK_N=512, BLOCK_K=1024, num_warps=4),
        rooflama.load(checkpoint_path(), device="cpu", max_context=64, progress=False) as interpreted,
    ):
        got = interpreted.logits(ids)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= 1e-4, f"relative error {error.max():.2e}"
