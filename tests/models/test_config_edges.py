"""What a config reader makes of unusual metadata: read right, or refused with the key, the rule and the remedy."""

import re

import numpy as np
import pytest

from memory_checkpoints import checkpoint, config_of
from rooflama.loaders.device import open_device
from rooflama.models import ConfigError, Decoder, TensorSource, adapter_for
from running_models import prefill_logits, running, worst_row_error
from tiny_checkpoints import MemoryCheckpoint, random_tokens


def load(stored):
    adapter = adapter_for(stored.metadata["general.architecture"])
    with open_device("cpu") as device:
        source = TensorSource(stored, device)
        return Decoder.load(source, adapter.read_config(source), adapter)


# The published models, as their files describe them: facts that can be checked against each model's card.

LLAMA3_ROPE = "default with 64 divisors"
PUBLISHED = [
    # arch, name: layers, hidden, heads, kv heads, head_dim, feed-forward, vocabulary, context, theta, tied
    ("llama", "Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e4, False, "MHA", 524288),
    ("llama", "Llama-2-70B", 80, 8192, 64, 8, 128, 28672, 32000, 4096, 1e4, False, "GQA", 327680),
    ("llama", "Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 5e5, False, "GQA", 131072),
    ("llama", "Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 5e5, True, "GQA", 32768),
    ("llama", "Llama-3.2-3B", 28, 3072, 24, 8, 128, 8192, 128256, 131072, 5e5, True, "GQA", 114688),
    ("llama", "TinyLlama-1.1B", 22, 2048, 32, 4, 64, 5632, 32000, 2048, 1e4, False, "GQA", 22528),
    ("llama", "SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e5, True, "GQA", 23040),
    ("llama", "SmolLM2-1.7B", 24, 2048, 32, 32, 64, 8192, 49152, 8192, 1.3e5, True, "MHA", 196608),
    ("qwen2", "Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e6, True, "GQA", 12288),
    ("qwen2", "Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944, 152064, 32768, 1e6, False, "GQA", 57344),
    ("qwen2", "Qwen2.5-72B", 80, 8192, 64, 8, 128, 29568, 152064, 32768, 1e6, False, "GQA", 327680),
    ("qwen3", "Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1e6, True, "GQA", 114688),
    ("qwen3", "Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e6, False, "GQA", 147456),
    ("phi3", "Phi-3-mini-4k", 32, 3072, 32, 32, 96, 8192, 32064, 4096, 1e4, False, "MHA", 393216),
    ("phi3", "Phi-3-medium-4k", 40, 5120, 40, 10, 128, 17920, 32064, 4096, 1e4, False, "GQA", 204800),
]


def published_header(arch, name, layers, hidden, heads, kv_heads, head_dim, inner, vocab, context, theta, tied):
    keys = {
        "block_count": layers,
        "embedding_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "feed_forward_length": inner,
        "context_length": context,
        "rope.freq_base": theta,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if arch == "qwen3":
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    shapes = {"token_embd.weight": (vocab, hidden)} | ({} if tied else {"output.weight": (vocab, hidden)})
    if context == 131072:
        shapes["rope_freqs.weight"] = (head_dim // 2,)
    arrays = {tensor: np.broadcast_to(np.float32(1), shape) for tensor, shape in shapes.items()}
    named = {f"{arch}.{key}": value for key, value in keys.items()}
    return MemoryCheckpoint({"general.architecture": arch, "general.name": name, **named}, arrays)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[1])
def test_published_models_are_read_for_what_they_are(row):
    arch, name, layers, _, heads, kv_heads, head_dim, _, vocab, context, theta, tied, kind, kv_bytes = row
    config = config_of(published_header(*row[:12]))
    assert (config.architecture, config.name, config.num_layers) == (arch, name, layers)
    assert (config.attention_kind, config.group_size, config.head_dim) == (kind, heads // kv_heads, head_dim)
    assert (config.vocab_size, config.context_length, config.tied_embeddings) == (vocab, context, tied)
    assert config.kv_bytes_per_token(2) == kv_bytes
    assert (config.rope.kind, config.rope.base) == ("default", theta)
    assert (config.rope.frequency_divisors is not None) == (context == 131072)
    assert config.qkv_bias == (arch == "qwen2")
    assert config.qk_norm == (arch == "qwen3")
    assert config.softmax_scale == head_dim**-0.5
    assert set(config.sliding_windows) == {0}


def test_llama_generations_differ_as_the_page_says():
    """The table at the top of models/llama.py, from what the files say."""
    llama2, llama3, llama32 = (
        config_of(published_header(*next(row for row in PUBLISHED if row[1] == name)[:12]))
        for name in ("Llama-2-7B", "Llama-3-8B", "Llama-3.2-1B")
    )
    assert [c.release for c in (llama2, llama3, llama32)] == ["Llama 2", "Llama 3", "Llama 3.2"]
    assert config_of(checkpoint("llama3")).release == ""  # a tiny one is none of them
    assert [c.rope.base for c in (llama2, llama3, llama32)] == [1e4, 5e5, 5e5]
    assert [c.rope.frequency_divisors is not None for c in (llama2, llama3, llama32)] == [False, False, True]
    assert [c.attention_kind for c in (llama2, llama3, llama32)] == ["MHA", "GQA", "GQA"]
    assert [c.vocab_size for c in (llama2, llama3, llama32)] == [32000, 128256, 128256]
    assert [c.tied_embeddings for c in (llama2, llama3, llama32)] == [False, False, True]


@pytest.mark.parametrize("theta_changed", [("llama2", 5e5), ("llama3", 1e4)])
@pytest.mark.usefixtures("numpy_backend")
def test_every_key_changes_the_result_or_is_refused(theta_changed):
    """No number of the file is read and then dropped: each one, changed, changes the logits or raises."""
    name, theta = theta_changed
    tokens = random_tokens(30)

    def logits(stored):
        with running(stored) as runner:
            return prefill_logits(runner, [tokens], 1024)[0]

    baseline = logits(checkpoint(name))
    for changes in (
        {"rope.freq_base": theta},
        {"attention.layer_norm_rms_epsilon": 0.03},
        {"attention.scale": 0.5},
        {"attention.sliding_window": 8},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ):
        assert worst_row_error(logits(checkpoint(name, changes)), baseline) > 1e-3, changes


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("llama3.1", ["rope_freqs.weight"]), ("phi3-128k", ["rope_factors_short.weight", "rope_factors_long.weight"])],
)
@pytest.mark.usefixtures("numpy_backend")
def test_rope_factor_tensors_change_the_result(name, tensors):
    tokens, results = random_tokens(30), []
    for without in ((), (*tensors, "rope.scaling.attn_factor")):
        with running(checkpoint(name, without=without)) as runner:
            results.append(prefill_logits(runner, [tokens], 1024)[0])
    assert worst_row_error(results[1], results[0]) > 1e-3


# Heads


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "MHA"), (6, "MHA"), (1, "MQA"), (2, "GQA"), ([2, 2], "GQA"), (np.array([6, 6]), "MHA")]
)
def test_head_count_kv(value, kind):
    stored = checkpoint("llama3", {"attention.head_count_kv": value}, without=() if value is not None else KV_KEY)
    config = config_of(stored)
    assert config.attention_kind == kind
    assert config.num_kv_heads * config.group_size == 6


KV_KEY = ("attention.head_count_kv",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, "6 query heads with 4 key/value heads"),
        (0, "head_count_kv = 0: must be a whole number >= 1"),
        (12, "6 query heads with 12 key/value heads"),
        (-2, "must be a whole number"),
        (2.5, "must be a whole number"),
        (float("nan"), "must be a whole number"),
        ("2", "must be a whole number"),
        (True, "must be a whole number"),
        ([2, 1], "layers of different shapes are not supported"),
        ([2, 0], "must be a whole number"),
        ([], "layers of different shapes"),
    ],
)
def test_head_count_kv_refused(value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(checkpoint("llama3", {"attention.head_count_kv": value}))


def test_head_dim_comes_from_key_length_or_the_division():
    assert config_of(checkpoint("llama-key-length")).head_dim == 40
    assert config_of(checkpoint("llama3", without=("attention.key_length", "attention.value_length"))).head_dim == 8
    only_key_length = checkpoint("llama-key-length", without=("attention.value_length",))
    assert config_of(only_key_length).head_dim == 40


@pytest.mark.parametrize(
    ("name", "changes", "without", "message"),
    [
        ("llama3", {"attention.value_length": 16}, (), "keys and values have one head_dim"),
        ("qwen2", {"attention.head_count": 5, "attention.head_count_kv": 5}, (), "a head has embedding_length / head_"),
        ("llama3", {"attention.key_length": 257, "attention.value_length": 257}, (), "kernels take at most 256"),
        ("llama3", {"attention.head_count": [6, 3]}, (), "layers of different shapes"),
        ("llama3", {"feed_forward_length": [80, 96]}, (), "layers of different shapes"),
        ("llama3", {"block_count": 0}, (), "must be a whole number >= 1"),
        ("llama3", {}, ("block_count",), "llama.block_count is missing"),
        ("llama3", {"block_count": 2**32 - 1}, (), "must be at most 10000"),
        ("llama3", {"context_length": 2**31}, (), "must be at most 2147483647"),
        ("llama3", {"attention.sliding_window": 2**63}, (), "must be at most 2147483647"),
        ("llama3", {}, ("context_length",), "llama.context_length is missing"),
        ("llama3", {}, ("attention.layer_norm_rms_epsilon",), "layer_norm_rms_epsilon is missing"),
        ("llama3", {"attention.layer_norm_rms_epsilon": float("nan")}, (), "must be a finite number > 0"),
        ("llama3", {"attention.layer_norm_rms_epsilon": 0.0}, (), "must be a finite number > 0"),
        ("llama3", {"attention.layer_norm_rms_epsilon": "small"}, (), "must be a finite number > 0"),
        ("llama3", {"vocab_size": 95}, (), "vocab_size 95 and 0 tokens, with 96 embedding rows"),
        ("llama3", {"expert_count": 8}, (), "mixtures of experts are not supported"),
        ("llama3", {"attention.sliding_window": -1}, (), "must be a whole number >= 0"),
        ("qwen2", {"attention.sliding_window": 8}, (), "without sliding_window_pattern"),
        ("qwen2-window", {"attention.sliding_window_pattern": [True]}, (), "must be 3 booleans, one for each layer"),
        ("qwen2-window", {"attention.sliding_window_pattern": [0, 1, 1]}, (), "must be 3 booleans"),
    ],
)
def test_refused(name, changes, without, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(checkpoint(name, changes, without=without))


def test_a_vocabulary_may_be_smaller_than_the_embedding_and_not_larger():
    stored = checkpoint("llama3")
    stored.metadata["tokenizer.ggml.tokens"] = ["a"] * 95
    assert config_of(stored).vocab_size == 96
    stored.metadata["tokenizer.ggml.tokens"] = ["a"] * 97
    with pytest.raises(ConfigError, match="97 tokens, with 96 embedding rows"):
        config_of(stored)


@pytest.mark.parametrize("tokens", [5, "abc", 1.5, True])
def test_a_vocabulary_that_is_no_list_is_refused(tokens):
    stored = checkpoint("llama3")
    stored.metadata["tokenizer.ggml.tokens"] = tokens
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.tokens is .*must be an array of strings"):
        config_of(stored)


@pytest.mark.parametrize(
    "key",
    [
        "attn_logit_softcapping",
        "logit_scale",
        "residual_scale",
        "attention.clamp_kqv",
        "rope.scaling.alpha",
        "rope.dimension_sections",
        "a_key_of_the_future",
    ],
)
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "phi3-medium"])
def test_unknown_keys_are_refused(name, key):
    with pytest.raises(ConfigError, match=rf"{key} = 2\.0.*drops nothing silently"):
        config_of(checkpoint(name, {key: 2.0}))


@pytest.mark.parametrize(("key", "value"), [("logit_scale", 1.0), ("embedding_scale", 1.0), ("attention.causal", True)])
def test_keys_that_ask_for_nothing_pass(key, value):
    config_of(checkpoint("llama3", {key: value}))
    with pytest.raises(ConfigError, match="drops nothing silently"):
        config_of(checkpoint("llama3", {key: not value}))
    with pytest.raises(ConfigError, match="drops nothing silently"):
        config_of(checkpoint("llama3", {key: np.array([value, value])}))


def test_keys_that_change_nothing_pass():
    config_of(checkpoint("llama3", {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": True}))
    config_of(checkpoint("llama3", {"expert_count": 0, "expert_used_count": 0}))


def test_unknown_architectures_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="adapters for llama, phi3, qwen2, qwen3"):
        adapter_for("mamba")


# Tensors


@pytest.mark.parametrize(
    ("name", "qkv", "output", "ffn", "qk_norm", "tied"),
    [
        ("llama3", False, False, False, False, False),
        ("llama-biases", True, True, True, False, False),
        ("llama-fused-qkv-biases", True, True, False, False, False),
        ("llama3.2-tied", False, False, False, False, True),
        ("qwen2", True, False, False, False, False),
        ("qwen3-tied", False, False, False, True, True),
        ("qwen3-bias", True, True, False, True, False),
        ("phi3-4k", False, False, False, False, False),
    ],
)
def test_biases_norms_and_tying_are_named(name, qkv, output, ffn, qk_norm, tied):
    config = config_of(checkpoint(name))
    found = (config.qkv_bias, config.output_bias, config.ffn_bias, config.qk_norm, config.tied_embeddings)
    assert found == (qkv, output, ffn, qk_norm, tied)


NORM = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "tensors", "without", "message"),
    [
        ("qwen2", {}, ("blk.1.attn_k.bias",), "tensor blk.1.attn_k.bias is missing"),
        ("qwen2", {}, tuple(f"blk.{i}.attn_{p}.bias" for i in (0, 1) for p in "qkv"), "attn_q.bias is missing"),
        ("llama-biases", {}, ("blk.1.ffn_up.bias",), "tensor blk.1.ffn_up.bias is missing"),
        ("llama3", {"blk.1.attn_q.bias": np.ones(48, np.float32)}, (), "blk.1.attn_q.bias are in the file"),
        ("llama3", {"blk.0.attn_q_norm.weight": NORM}, (), "drops nothing silently"),
        ("qwen3", {}, ("blk.1.attn_k_norm.weight",), "attn_k_norm.weight is missing"),
        ("qwen3", {"blk.0.attn_q_norm.weight": NORM}, (), "has shape [8]: the metadata asks for [16]"),
        ("llama3", {}, ("blk.0.attn_v.weight",), "attn_v.weight is missing"),
        ("llama3", {}, ("blk.1.ffn_gate.weight",), "ffn_up.weight has shape [80, 48]"),
        ("llama3", {}, ("token_embd.weight",), "token_embd.weight is missing"),
        ("llama3", {"blk.2.ffn_norm.weight": NORM}, (), "blk.2.ffn_norm.weight are in the file"),
    ],
)
def test_tensors_missing_misshapen_or_left_over_are_refused(name, tensors, without, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(checkpoint(name, {}, tensors, without=without))
