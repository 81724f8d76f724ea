"""A model shared by several ranks equals the model of one rank: processes over gloo, kernels by their definitions."""

import copy

import pytest
import torch

import rank_work
from running_models import assert_parity
from tiny_checkpoints import cases, gguf_metadata, gguf_tensors, make_module, random_tokens, write_gguf
from worlds import world

LENGTH = 40  # tokens
TWO = [name for name, case in cases().items() if case.in_gguf and case.config.num_attention_heads % 2 == 0]


@pytest.fixture(scope="module")
def worlds():
    with world(2) as two, world(4) as four:
        yield {2: two, 4: four}


def with_heads(name, heads, kv_heads):
    """A tiny case with another number of heads, as a module."""
    config = copy.deepcopy(cases()[name].config)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.hidden_size = 64
    return make_module(config)


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
    case = cases()[name]
    made = make_module(copy.deepcopy(case.config))
    metadata = gguf_metadata(case.config) | dict(case.extra or {})
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(made, fused_qkv=case.fused_qkv))
    check_parity(worlds[2], path, case.config.vocab_size)
