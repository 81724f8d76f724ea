"""A model shared by two GPUs equals the model of one: sums through NCCL and through mapped memory, captured steps."""

import pytest
import torch

import rank_work
import rooflama
from running_models import assert_parity
from small_checkpoint import VOCABULARY, write_small
from tiny_checkpoints import cases, random_tokens, write_case
from worlds import world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NAMES = (
    "llama3.1",
    "llama-mqa",
    "llama-fused-qkv-biases",
    "mistral-window",
    "qwen2",
    "qwen3",
    "phi3-128k",
    "phi4-mini",
)
LENGTH = 40  # tokens


@pytest.fixture(scope="module")
def two():
    with world(2, "cpu:gloo,cuda:nccl") as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_that_of_one_gpu(name, two, tmp_path):
    path, tokens = write_case(name, tmp_path, "gguf"), random_tokens(LENGTH, cases()[name].config.vocab_size)
    options = {"device": "cuda", "dtype": torch.float32}
    alone = rank_work.logits_alone(path, tokens, **options)
    found = two.run(rank_work.logits, path, tokens, options)
    for here, there in zip(found[0], alone, strict=True):
        assert_parity(here, there, name)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_further_off_than_one_gpu(name, two, tmp_path):
    """Distance to one GPU in float32, against twice that of one GPU in bfloat16."""
    path, tokens = write_case(name, tmp_path, "gguf"), random_tokens(LENGTH, cases()[name].config.vocab_size)
    exact, rounded = (
        rank_work.logits_alone(path, tokens, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    found = two.run(rank_work.logits, path, tokens, {"device": "cuda", "dtype": torch.bfloat16})
    assert all(map(torch.equal, *found))
    for here, there, same in zip(found[0], exact, rounded, strict=True):
        assert float((here - there).norm()) <= 2 * float((same - there).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_through_mapped_memory_are_those_of_gathered_addends(dtype, two):
    assert two.run(rank_work.same_sums, 3000, dtype) == [[], []]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 40, "seed": 3}], ids=["greedy", "sampled"])
def test_captured_steps_draw_the_text_of_one_gpu(options, two, tmp_path):
    path, load = write_small(tmp_path / "small.gguf"), {"device": "cuda", "dtype": "float32", "max_context": 96}
    options = options | {"max_new_tokens": 24}
    with rooflama.load(path, progress=False, **load) as model:
        alone = model.generate(["ab ab", "a"], **options)
    for found in two.run(rank_work.generate, path, ["ab ab", "a"], load, options):
        assert [made.token_ids for made in found] == [made.token_ids for made in alone]


def test_batch_invariance(two, tmp_path):
    """A text alone and among others: the same log probabilities, bit for bit."""
    path = write_small(tmp_path / "small.gguf")
    load = {"device": "cuda", "dtype": "bfloat16", "max_context": 96, "batch_invariant": True}
    options = {"max_new_tokens": 8, "logprobs": 0}
    (alone,) = two.run(rank_work.generate, path, ["ab ab"], load, options)[0]
    among = two.run(rank_work.generate, path, ["ab ab", "a", "b a b a b"], load, options)[0][0]
    assert (alone.token_ids, alone.logprobs) == (among.token_ids, among.logprobs)


def test_an_error_of_one_rank_is_raised_by_all(two, tmp_path):
    path = write_small(tmp_path / "small.gguf")
    found = two.run(rank_work.error_of_loading, path, 1)
    assert found[1].startswith("DeviceOutOfMemory")
    assert found[0].startswith("RankFailed: rank 1")
    tokens = random_tokens(LENGTH, VOCABULARY)
    options = {"device": "cuda", "dtype": torch.float32}
    assert all(map(torch.equal, *two.run(rank_work.logits, path, tokens, options)))  # the world goes on
