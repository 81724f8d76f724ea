"""Rotary parameters of a GGUF file: read as llama.cpp reads them, or refused with the key, the rule and the remedy."""

import math
import re

import numpy as np
import pytest

from memory_checkpoints import checkpoint, config_of
from rooflama.models import ConfigError
from rooflama.models.rope.spec import RopeError, attention_factor, inverse_frequencies, rope_tables


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
