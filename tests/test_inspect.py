"""The summary of ``rooflama.inspect`` for a file of each family."""

import re

import pytest

import rooflama
from rooflama import ConfigError
from small_checkpoint import Parts, write_small
from tiny_checkpoints import write_case


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama3.1",
            {
                "attention": "GQA: 6 query heads on 2 key/value heads (group 3), head_dim 32",
                "RoPE": "default (16 frequency_divisors), base 500000",
                "sliding window": "none",
                "biases": "none",
                "output": "its own matrix",
                "context": "256 tokens",
                "norm eps": "1e-05",
            },
        ),
        ("llama2", {"attention": "MHA: 6 query heads on 6 key/value heads (group 1), head_dim 8"}),
        ("llama-mqa", {"attention": "MQA: 6 query heads on 1 key/value heads (group 6), head_dim 8"}),
        ("llama-biases", {"biases": "q, k, v, attention output, feed-forward"}),
        ("llama-linear", {"RoPE": "linear (factor 4), base 10000"}),
        ("qwen2-tied-group7", {"biases": "q, k, v", "output": "tied to the token embedding", "QK norm": "no"}),
        ("qwen2-window", {"sliding window": "none on 1 layers, 9 on 2 layers"}),
        ("qwen3", {"QK norm": "yes", "biases": "none"}),
        ("phi3-4k", {"sliding window": "9 on 2 layers"}),
    ],
)
def test_what_it_says(name, expected, tmp_path):
    said = dict(rooflama.inspect(write_case(name, tmp_path, "gguf")).rows())
    assert {label: said[label] for label in expected} == expected


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2-yarn", ["yarn (factor 4, original_context 32", "attention_factor 1.13863", "base 1e+06"]),
        (
            "phi4-mini",
            ["longrope (factor 8, original_context 32", "6 short_factors", "6 long_factors", "12 of 16 dimensions"],
        ),
    ],
)
def test_rotary_parameters_are_all_there(name, parts, tmp_path):
    rope = dict(rooflama.inspect(write_case(name, tmp_path, "gguf")).rows())["RoPE"]
    assert not [part for part in parts if part not in rope], rope


def test_bytes_and_types_are_counted(tmp_path):
    said = dict(rooflama.inspect(write_case("llama3", tmp_path, "gguf")).rows())
    assert said["tensors"].startswith("F32 21 (")
    assert said["K/V cache"].startswith(f"{2 * 2 * 2 * 8 * 2:,} bytes per token in 16 bits")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.context_length", 0),
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "warp"),
        ("llama.attention.value_length", 8),
        ("llama.vocab_size", 3),
        ("llama.attention.sinks", 4),
        ("tokenizer.ggml.tokens", "abc"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_byte(key, value, tmp_path):
    path = write_small(tmp_path / "small.gguf", {key: value})
    byte = path.read_bytes().index(key.encode()) + len(key) + 4  # the key, its value's type, its value
    found = re.escape(f"{path}, byte {byte}: ") + ".*" + re.escape(key.removeprefix("llama."))
    with pytest.raises(ConfigError, match=f"^{found}"):
        rooflama.inspect(path)


def test_what_is_missing_is_named_with_its_file(tmp_path):
    parts = Parts()
    del parts.metadata["llama.block_count"]
    path = parts.write(tmp_path / "small.gguf")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: llama.block_count is missing"):
        rooflama.inspect(path)
