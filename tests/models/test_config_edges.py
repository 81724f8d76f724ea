"""What a config reader makes of unusual metadata: read right, or refused with the key, the rule and the remedy."""

import math
import re

import numpy as np
import pytest

from rooflama.loaders.device import open_device
from rooflama.models import CheckpointReader, ConfigError, Decoder, TensorSource, adapter_for
from rooflama.models.rope import RopeError, attention_factor, inverse_frequencies, rope_tables
from running_models import prefill_logits, running, worst_row_error
from tiny_checkpoints import MemoryCheckpoint, cases, gguf_metadata, gguf_tensors, module, random_tokens


def checkpoint(name, changes=(), tensors=(), *, without=()):
    """Case ``name`` in memory, with keys of its architecture and tensors changed, or left out."""
    made = module(name)
    metadata = gguf_metadata(made.config) | dict(cases()[name].extra or {})
    arch = metadata["general.architecture"]
    metadata |= {f"{arch}.{key}": value for key, value in dict(changes).items()}
    arrays = gguf_tensors(made, fused_qkv=cases()[name].fused_qkv) | dict(tensors)
    dropped = {*without, *(f"{arch}.{key}" for key in without)}
    return MemoryCheckpoint(
        {key: value for key, value in metadata.items() if key not in dropped},
        {key: value for key, value in arrays.items() if key not in dropped},
    )


def config_of(stored):
    return adapter_for(stored.metadata["general.architecture"]).read_config(CheckpointReader(stored))


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
    assert [c.generation for c in (llama2, llama3, llama32)] == ["Llama 2", "Llama 3", "Llama 3.2"]
    assert config_of(checkpoint("llama3")).generation == ""  # a tiny one is none of them
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
        with running(stored) as engine:
            return prefill_logits(engine, [tokens], 1024)[0]

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
        with running(checkpoint(name, without=without)) as engine:
            results.append(prefill_logits(engine, [tokens], 1024)[0])
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
        ("llama3", {"attention.key_length": 12, "attention.value_length": 12}, (), "multiples of 8 up to 256"),
        ("llama3", {"attention.key_length": 264, "attention.value_length": 264}, (), "multiples of 8 up to 256"),
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


# Rotary parameters


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("llama3", {"rope.scaling.type": "ntk"}, ConfigError, "types are none, linear, yarn and longrope"),
        ("llama3", {"rope.scaling.type": 2}, ConfigError, "must be a string"),
        ("llama3", {"rope.scaling.type": "longrope"}, ConfigError, "longrope needs both factor tensors"),
        ("phi3-128k", {"rope.scaling.type": "linear"}, ConfigError, "longrope needs both factor tensors"),
        ("phi3-128k", {"rope.scaling.factor": 4.0}, ConfigError, "factor 4.0 with scaling type 'longrope'"),
        ("llama3", {"rope.scaling.yarn_attn_factor": "1.2"}, ConfigError, "must be a finite number"),
        ("qwen2-yarn", {"rope.scaling.yarn_beta_fast": -1.0}, ConfigError, "must be a finite number > 0"),
        ("qwen2-yarn", {"rope.scaling.yarn_ext_factor": float("nan")}, ConfigError, "must be a finite number"),
        ("qwen2-yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, ConfigError, "yarn_log_multiplier = 0.1"),
        ("llama3", {"rope.freq_base": 0.0}, ConfigError, "must be a finite number > 0"),
        ("llama3", {"rope.freq_base": float("inf")}, ConfigError, "must be a finite number > 0"),
        ("llama3", {"rope.freq_base": float("nan")}, ConfigError, "must be a finite number > 0"),
        ("llama3", {"rope.freq_base": -1e4}, ConfigError, "must be a finite number > 0"),
        ("llama3", {"rope.freq_base": 1.0}, RopeError, "the base is above 1"),
        ("llama-linear", {"rope.scaling.factor": -4.0}, RopeError, "factor is -4.0: factor is a finite number above 0"),
        ("llama3", {"rope.huggingface": "default"}, ConfigError, "must be a mapping"),
        ("phi3-4k", {"rope.dimension_count": 15}, RopeError, "rotary_dim is even"),
        ("phi3-4k", {"rope.dimension_count": 32}, RopeError, "between 2 and head_dim"),
        ("llama3", {"rope.dimension_count": 4}, ConfigError, "architecture llama rotates whole heads"),
    ],
)
def test_rotary_parameters_refused(name, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        config_of(checkpoint(name, changes))


@pytest.mark.parametrize(
    ("name", "tensors", "without", "error", "message"),
    [
        ("llama3.1", {"rope_freqs.weight": np.zeros(16, np.float32)}, (), RopeError, "finite number above 0"),
        ("llama3.1", {"rope_freqs.weight": np.ones(32, np.float32)}, (), ConfigError, "metadata asks for [16]"),
        ("phi3-128k", {}, ("rope_factors_long.weight",), ConfigError, "with 1 of the tensors"),
        ("phi3-128k", {}, ("rope_factors_short.weight",), ConfigError, "with 1 of the tensors"),
        ("phi3-128k", {"rope_freqs.weight": np.ones(8, np.float32)}, (), ConfigError, "and with rope_freqs"),
        ("phi3-128k", {"rope_factors_long.weight": np.full(8, np.nan, np.float32)}, (), RopeError, "finite number"),
    ],
)
def test_rotary_factor_tensors_refused(name, tensors, without, error, message):
    with pytest.raises(error, match=re.escape(message)):
        config_of(checkpoint(name, {}, tensors, without=without))


@pytest.mark.parametrize("attn_factor", [None, 1.3])
@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({}, None),
        ({"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}, None),
        ({"yarn_beta_fast": 0.05, "yarn_beta_slow": 0.01}, None),
        ({"yarn_ext_factor": 0.5}, None),
        ({"yarn_attn_factor": 0.878}, "yarn_attn_factor = 0.878"),
        ({"yarn_ext_factor": 0.0, "yarn_attn_factor": 0.878}, None),
    ],
)
def test_yarn_keys_are_those_of_llama_cpp(changes, unread, attn_factor, recwarn):
    """The ramp and the magnitude, operation by operation as in ggml's rope_yarn and llama_context."""
    factor, original, dims, base = 4.0, 32, 8, 1e6
    extra = {} if attn_factor is None else {"rope.scaling.attn_factor": attn_factor}
    keys = {f"rope.scaling.{key}": value for key, value in changes.items()} | extra
    spec = config_of(checkpoint("qwen2-yarn", keys)).rope
    assert (spec.scaling.factor, spec.scaling.original_context) == (factor, original)
    assert (spec.rotary_dim, spec.base) == (dims, base)
    assert [str(warning.message).split(" in the file")[0] for warning in recwarn] == (
        [f"rope.scaling.{unread}"] if unread else []
    )

    given = {"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, **changes}
    ext_factor = given["yarn_ext_factor"] if given["yarn_ext_factor"] >= 0 else 1.0
    magnitude = given["yarn_attn_factor"]
    implied = 1 + 0.1 * math.log(factor)
    if ext_factor != 0:
        magnitude = implied * (1 / implied)
    magnitude *= attn_factor or 1.0
    edges = [
        dims * math.log(original / (given[key] * 2 * math.pi)) / (2 * math.log(base))
        for key in ("yarn_beta_fast", "yarn_beta_slow")
    ]
    low, high = max(0, math.floor(edges[0])), min(dims - 1, math.ceil(edges[1]))
    expected = []
    for j in range(dims // 2):
        extrapolated = base ** (-2 * j / dims)
        mix = (1 - min(1, max(0, (j - low) / max(0.001, high - low)))) * ext_factor
        expected.append(extrapolated / factor * (1 - mix) + extrapolated * mix)
    if ext_factor != 0:
        magnitude *= implied
    np.testing.assert_allclose(inverse_frequencies(spec), expected, rtol=1e-12)
    assert attention_factor(spec) == pytest.approx(magnitude, rel=1e-12)


def test_a_factor_of_0_is_none():
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        assert config_of(checkpoint("llama3", {key: 0.0})).rope == config_of(checkpoint("llama3")).rope
        assert config_of(checkpoint("llama3", {key: 4.0})).rope.kind == "linear"


@pytest.mark.parametrize("name", ["llama3", "llama-linear"])
def test_attn_factor_counts_in_every_kind_and_yarn_keys_only_in_yarn(name):
    plain = config_of(checkpoint(name)).rope
    louder = config_of(checkpoint(name, {"rope.scaling.attn_factor": 1.2})).rope
    assert attention_factor(louder) == 1.2
    np.testing.assert_array_equal(inverse_frequencies(louder), inverse_frequencies(plain))
    for table, reference in zip(rope_tables(louder, 5), rope_tables(plain, 5), strict=True):
        np.testing.assert_allclose(table, 1.2 * reference, rtol=1e-6, atol=1e-7)
    stray = {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_log_multiplier": 0.1}
    with pytest.warns(UserWarning, match=r"yarn_beta_fast = 8, rope\.scaling\.yarn_log_multiplier = 0\.1 in the file"):
        assert config_of(checkpoint(name, stray)).rope == plain


def test_phi3_longrope_is_told_by_its_tensors_alone():
    stored = checkpoint("phi3-128k")
    assert "phi3.rope.scaling.type" not in stored.metadata
    rope = config_of(stored).rope
    assert (rope.kind, rope.scaling.original_context, rope.scaling.factor) == ("longrope", 32, 8.0)
    named = config_of(checkpoint("phi3-128k", {"rope.scaling.type": "longrope"})).rope
    assert named == rope
    derived = config_of(checkpoint("phi3-128k", without=("rope.scaling.attn_factor",))).rope
    assert attention_factor(derived) == pytest.approx(attention_factor(rope), rel=1e-12)


def test_partial_rotary_and_windows_are_read():
    phi4 = config_of(checkpoint("phi4-mini"))
    assert (phi4.rope.rotary_dim, phi4.head_dim) == (12, 16)
    assert set(phi4.sliding_windows) == {0}
    assert set(config_of(checkpoint("phi3-4k")).sliding_windows) == {9}
    assert config_of(checkpoint("qwen2-window")).sliding_windows == (0, 9, 9)


def test_yarn_extends_the_context_that_the_file_states():
    stated_before = checkpoint("qwen2-yarn", {"context_length": 32})
    assert config_of(stated_before).context_length == 128
    stated_after = checkpoint("qwen2-yarn", {"context_length": 128})
    assert config_of(stated_after).context_length == 128


def test_llama_3_1_without_rope_freqs_is_flagged(recwarn):
    long_context = {"context_length": 131072}
    with pytest.warns(UserWarning, match=r"rope_freqs\.weight.*lacks.*Convert it again"):
        config_of(checkpoint("llama3", long_context))
    recwarn.clear()
    config_of(checkpoint("llama3.1", long_context))
    config_of(checkpoint("llama2", long_context))
    config_of(checkpoint("llama3", {"context_length": 8192}))
    assert not recwarn.list
