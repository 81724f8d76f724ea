"""Every family and edge case against transformers' logits in float32, from GGUF and from safetensors."""

import copy

import pytest
import torch

from rooflama.loaders.gguf import read_gguf
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.models.rope.spec import RopeError
from running_models import assert_parity, decode_logits, prefill_logits, running
from tiny_checkpoints import ORIGINAL, SIZES, cases, make_module, module, random_tokens, reference_logits, write_case

pytestmark = pytest.mark.usefixtures("numpy_backend")

GGUF_CASES = [name for name, case in cases().items() if case.in_gguf]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def tokens_of(name, length):
    return random_tokens(length, cases()[name].config.vocab_size)


def check_every_way(checkpoint, name):
    """Prefill in passes of several sizes, then half prefill and half decode, at each of the case's lengths."""
    with running(checkpoint) as runner:
        for length in cases()[name].lengths:
            tokens = tokens_of(name, length)
            expected = reference_logits(module(name), tokens)
            for chunk in (1, 7, 64, 1024):
                (logits,) = prefill_logits(runner, [tokens], chunk)
                assert_parity(logits, expected, f"{name}, {length} tokens in passes of {chunk}")
            prompt = length // 2
            (logits,) = decode_logits(runner, [tokens], [prompt])
            assert_parity(logits, expected[prompt:], f"{name}, {length} tokens, decoded from {prompt}")


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_matches_transformers(name, folder):
    with read_gguf(write_case(name, folder, "gguf")) as checkpoint:
        check_every_way(checkpoint, name)


@pytest.mark.parametrize("name", [name for name, case in cases().items() if not case.fused_qkv])
def test_safetensors_match_transformers(name, folder):
    with read_safetensors(write_case(name, folder, "safetensors")) as checkpoint:
        check_every_way(checkpoint, name)


@pytest.mark.parametrize("name", ["llama3.1", "mistral-window", "phi3-128k", "qwen2-yarn", "qwen3"])
def test_a_batch_of_mixed_lengths_equals_one_by_one(name, folder):
    lengths, prompt_lengths = [5, 72, 33, 1, 17], [2, 40, 32, 1, 9]
    sequences = [tokens_of(name, length) for length in lengths]
    with (
        read_gguf(write_case(name, folder, "gguf")) as checkpoint,
        running(checkpoint, num_seqs=len(lengths)) as runner,
    ):
        together = prefill_logits(runner, sequences, 64)
        decoded = decode_logits(runner, sequences[:3], prompt_lengths[:3])
        for tokens, logits in zip(sequences, together, strict=True):
            (alone,) = prefill_logits(runner, [tokens], 1024)
            assert_parity(logits, alone, f"{len(tokens)} tokens, in a batch against alone", 2e-6)
            assert_parity(logits, reference_logits(module(name), tokens), f"{len(tokens)} tokens of a batch")
        for tokens, prompt, logits in zip(sequences, prompt_lengths, decoded, strict=False):
            (alone,) = decode_logits(runner, [tokens], [prompt])
            assert_parity(logits, alone, f"{len(tokens)} tokens, decoded in a batch against alone", 2e-6)


@pytest.mark.parametrize(
    ("policy", "length", "planned", "expected"),
    [
        ("auto", 20, ORIGINAL, "short"),
        ("auto", 20, ORIGINAL + 1, "long"),
        ("long", 20, 20, "long"),
        ("short", 72, 72, "short"),
    ],
)
@pytest.mark.parametrize("name", ["phi3-128k", "phi4-mini"])
def test_a_sequence_keeps_the_longrope_set_of_its_planned_length(name, policy, length, planned, expected, folder):
    """The oracle has the expected set in both places, so that its own switch changes nothing."""
    config = copy.deepcopy(cases()[name].config)
    factors = config.rope_parameters[f"{expected}_factor"]
    config.rope_parameters |= {"short_factor": factors, "long_factor": factors}
    tokens = tokens_of(name, length)
    reference = reference_logits(make_module(config), tokens)
    with read_gguf(write_case(name, folder, "gguf")) as checkpoint, running(checkpoint, longrope=policy) as runner:
        (logits,) = prefill_logits(runner, [tokens], 7, planned=planned)
    assert_parity(logits, reference, f"{length} tokens of {planned} planned, policy {policy}")


def test_an_unknown_longrope_policy_is_refused(folder):
    with (
        read_gguf(write_case("phi3-128k", folder, "gguf")) as checkpoint,
        pytest.raises(RopeError, match="longrope policy 'medium'"),
        running(checkpoint, longrope="medium"),
    ):
        pass


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A folder with dynamic scaling and a short context, and a new module of the same weights: it keeps a state."""
    config = copy.deepcopy(cases()["llama-dynamic"].config)
    config.max_position_embeddings = ORIGINAL
    folder = tmp_path_factory.mktemp("dynamic")
    make_module(config).save_pretrained(folder)
    return folder, lambda rope: make_module(
        copy.deepcopy(config).from_dict(config.to_dict() | {"rope_parameters": rope})
    )


@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 72])
def test_dynamic_scaling_stretches_as_in_transformers(length, dynamic):
    folder, made = dynamic
    tokens = tokens_of("llama-dynamic", length)
    expected = reference_logits(made(DYNAMIC), tokens)
    with read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        for chunk in (7, 1024):
            (logits,) = prefill_logits(runner, [tokens], chunk)
            assert_parity(logits, expected, f"{length} tokens in passes of {chunk}")
        (logits,) = decode_logits(runner, [tokens], [length // 2])
        assert_parity(logits, expected[length // 2 :], f"{length} tokens, decoded")


@pytest.mark.parametrize("planned", [20, ORIGINAL, ORIGINAL + 1, 96])
def test_a_sequence_keeps_the_base_of_its_planned_length(planned, dynamic):
    """The oracle has the stretched base from the start, so that its own stretching changes nothing."""
    folder, made = dynamic
    stretch = 4.0 * max(planned, ORIGINAL) / ORIGINAL - 3.0
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    base = 1e4 * stretch ** (head_dim / (head_dim - 2))
    tokens = tokens_of("llama-dynamic", 20)
    expected = reference_logits(made({"rope_type": "default", "rope_theta": base}), tokens)
    with read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        (logits,) = prefill_logits(runner, [tokens], 7, planned=planned)
    assert_parity(logits, expected, f"20 tokens of {planned} planned")


def test_sequences_of_a_batch_keep_their_own_base(dynamic):
    folder, _ = dynamic
    lengths, prompt_lengths = [5, 72, 33, 2, 90], [2, 40, 32, 1, 9]
    sequences = [tokens_of("llama-dynamic", length) for length in lengths]
    with read_safetensors(folder) as checkpoint, running(checkpoint, num_seqs=len(lengths)) as runner:
        together = prefill_logits(runner, sequences, 64)
        decoded = decode_logits(runner, sequences, prompt_lengths)
        for tokens, prompt, prefilled, stepped in zip(sequences, prompt_lengths, together, decoded, strict=True):
            (alone,) = prefill_logits(runner, [tokens], 1024)
            assert_parity(prefilled, alone, f"{len(tokens)} tokens, in a batch against alone", 2e-6)
            assert_parity(stepped, alone[prompt:], f"{len(tokens)} tokens, decoded in a batch", 2e-5)


def test_the_cache_is_free_again_after_use(folder):
    with read_gguf(write_case("llama2", folder, "gguf")) as checkpoint, running(checkpoint) as runner:
        free = runner.cache.pool.num_free
        prefill_logits(runner, [tokens_of("llama2", 40)], 7)
        decode_logits(runner, [tokens_of("llama2", 40)], [20])
        assert runner.cache.pool.num_free == free
    assert torch.get_default_dtype() == torch.float32
