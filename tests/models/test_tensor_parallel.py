"""A model shared by several ranks equals the model of one rank: processes over gloo, kernels by their definitions."""

import copy
import json

import pytest
import torch

import rank_work
import rooflama
from demo_oracle import PROMPTS, checkpoint_path
from rooflama import ArgumentError
from rooflama.kernels import use_backend
from rooflama.testing.assertions import assert_within_rounding
from running_models import assert_parity
from small_checkpoint import VOCABULARY, write_small
from speaking_checkpoint import speaking
from tiny_checkpoints import cases, gguf_metadata, gguf_tensors, make_module, random_tokens, write_case, write_gguf
from worlds import world

LENGTH = 40  # tokens
CPU = {"device": "cpu"}
TWO = (
    "llama2", "llama3.1", "llama3.2-tied", "llama-mqa", "llama-head-dim-10", "llama-biases", "llama-fused-qkv-biases",
    "mistral-window", "qwen2", "qwen2-fused-qkv", "qwen3", "phi3-4k", "phi3-128k", "phi4-mini",
)  # fmt: skip
FOUR = {"llama3": (8, 2), "llama-biases": (4, 4), "qwen2": (8, 1), "qwen3": (8, 2), "phi3-medium": (8, 4)}


@pytest.fixture(scope="module")
def worlds():
    with world(2) as two, world(4) as four:
        yield {2: two, 4: four}


def check_parity(world, path, vocab_size, **options):
    tokens = random_tokens(LENGTH, vocab_size)
    alone = rank_work.logits_alone(path, tokens, **options)
    found = world.run(rank_work.logits, path, tokens, options)
    for of_rank in found:
        for here, there, what in zip(of_rank, alone, ("prefilled", "decoded"), strict=True):
            assert_parity(here, there, f"{what} on {world.size} ranks", 2e-6)
    for of_rank in found[1:]:
        assert all(map(torch.equal, of_rank, found[0]))  # so that all ranks draw the same token


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name, worlds, tmp_path):
    check_parity(worlds[2], write_case(name, tmp_path, "gguf"), cases()[name].config.vocab_size)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name, worlds, tmp_path):
    """Also with fewer key/value heads than ranks, and with a vocabulary that four do not divide."""
    config = copy.deepcopy(cases()[name].config)
    config.num_attention_heads, config.num_key_value_heads = FOUR[name]
    config.hidden_size, config.vocab_size = 64, 97
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), gguf_tensors(make_module(config)))
    check_parity(worlds[4], path, config.vocab_size)


@pytest.mark.parametrize("gather_bytes", [0, 1 << 20], ids=["reduced by gloo", "gathered"])
def test_every_rank_has_the_same_sum(gather_bytes, worlds):
    """And the same vocabulary, of 15 columns on 4 ranks."""
    addends, bias, residual = torch.randn(4, 3, 15), torch.randn(15), torch.randn(3, 15)
    found = worlds[4].run(rank_work.sum_by, gather_bytes, addends, bias, residual)
    exact = addends.double().sum(0) + bias + residual
    assert_within_rounding(found[0][0], exact.numpy(), (addends.sum(0) + bias + residual))
    for total, joined in found:
        assert torch.equal(total, found[0][0])
        assert torch.equal(joined, residual)


def test_a_quantised_model(worlds, tmp_path):
    """Types differ within one stacked projection, as llama-quantize writes them."""
    path = write_small(tmp_path / "small.gguf")
    check_parity(worlds[2], path, VOCABULARY)


def test_texts_are_those_of_one_rank(worlds, tmp_path):
    path = write_small(tmp_path / "small.gguf")
    prompts, options = ["a", "ab ab"], {"max_new_tokens": 8, "temperature": 0.9, "seed": 5, "logprobs": 2}
    with use_backend("numpy"), rooflama.load(path, device="cpu", progress=False) as model:
        alone = model.generate(prompts, **options)
    for found in worlds[2].run(rank_work.generate, path, prompts, CPU, options):
        assert [made.token_ids for made in found] == [made.token_ids for made in alone]
        assert [made.text for made in found] == [made.text for made in alone]


def test_batch_invariance(worlds, tmp_path):
    """The kernels themselves: alone, together and in chunks, the same bits."""
    path = write_small(tmp_path / "small.gguf")
    sequences = [random_tokens(length, VOCABULARY) for length in (2, 5)]
    (whole, *_) = worlds[2].run(rank_work.invariant_logits, path, sequences, 64)
    (chunked, *_) = worlds[2].run(rank_work.invariant_logits, path, sequences, 3)
    (alone, *_) = worlds[2].run(rank_work.invariant_logits, path, sequences[1:], 64)
    assert all(map(torch.equal, whole, chunked))
    assert torch.equal(whole[1], alone[0])


def test_ranks_draw_the_same_seeds(worlds, tmp_path):
    path = write_small(tmp_path / "small.gguf")
    options = {"max_new_tokens": 4, "temperature": 2.0}
    one, other = worlds[2].run(rank_work.generate, path, ["a", "a"], CPU, options)
    assert [made.seed for made in one] == [made.seed for made in other]
    assert one[0].seed != one[1].seed
    assert [made.token_ids for made in one] == [made.token_ids for made in other]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_raised_by_all(rank, worlds, tmp_path):
    path = write_small(tmp_path / "small.gguf")
    found = worlds[2].run(rank_work.error_of_loading, path, rank)
    assert found[rank].startswith("DeviceOutOfMemory: allocating 'keys of layer 0'")
    assert found[1 - rank].startswith(f"RankFailed: rank {rank}: allocating 'keys of layer 0'")
    check_parity(worlds[2], path, VOCABULARY)  # the world goes on


def test_commands(worlds, tmp_path):
    """The first rank reads the prompt and writes the answer; the others compute, in silence."""
    path = speaking(tmp_path / "small.gguf", "yes")
    model = ["--device", "cpu"]
    first, second = worlds[2].run(rank_work.command, ["run", path, "-", "--max-new-tokens", "4", *model], "ab")
    assert first[:2] == (0, "yesyesyesyes\n")
    assert second == (0, "", "")
    first, second = worlds[2].run(rank_work.command, ["chat", path, "--max-new-tokens", "2", *model], "hi\n\n")
    assert first[:2] == (0, "yesyes\n")
    assert second == (0, "", "")
    first, second = worlds[2].run(rank_work.command, ["plan", path, "--json", *model], "")
    assert json.loads(first[1])["ranks"] == 2
    assert second == (0, "", "")
    first, second = worlds[2].run(rank_work.command, ["check", path, *model], "")
    assert "FAIL" not in first[1]
    assert "generation" in first[1]
    assert second == (first[0], "", "")
    refused = worlds[2].run(rank_work.command, ["run", str(checkpoint_path()), "a", *model], "")
    assert [said[2].count("Use 1 or 3 ranks.") for said in refused] == [1, 0]
    assert [said[0] for said in refused] == [2, 2]


@pytest.mark.demo_checkpoint
def test_the_demo_checkpoint_on_three_ranks():
    """9 query and 3 key/value heads. ``test_demo_checkpoint`` holds one rank to transformers' text."""
    path, load = checkpoint_path(), CPU | {"max_context": 64}
    with world(3) as three:
        texts = three.run(rank_work.generate, path, [PROMPTS[0]], load, {"max_new_tokens": 6})
    assert [found.text for (found,) in texts] == [" Paris.\n\nThe answer"] * 3


def test_a_killed_rank_ends_the_others_at_once(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    with world(2) as two:
        gone, (ok, found) = two.attempt(rank_work.vanish, 0, path, random_tokens(LENGTH, VOCABULARY))
        assert gone == (False, "ended")
        assert ok, found
        error, seconds = found
        assert error.startswith("rank 1 of 2 lost the others")
        assert seconds < 10


def test_without_a_process_group(tmp_path):
    path = write_small(tmp_path / "small.gguf")
    with pytest.raises(ArgumentError, match=r"tensor_parallel without a process group: .*Start with torchrun"):
        rooflama.load(path, device="cpu", tensor_parallel=True)
