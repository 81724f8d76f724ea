"""A model shared by several ranks equals the model of one rank: processes over gloo, kernels by their definitions."""

import copy

import pytest
import torch

import rank_work
from running_models import assert_parity
from tiny_checkpoints import cases, gguf_metadata, gguf_tensors, make_module, random_tokens, write_case, write_gguf
from worlds import world

LENGTH = 40  # tokens
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
