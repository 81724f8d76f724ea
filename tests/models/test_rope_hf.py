"""Rotary parameters of a config.json: what is read, what is refused, and which of two values counts."""

import warnings

import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rooflama.models.rope.huggingface import KEYS, rope_from_hf
from rooflama.models.rope.spec import KINDS, LongRope, RopeError, RopeSpec, attention_factor, inverse_frequencies

EPS32 = 2.0**-23
PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.5] * 4, "long_factor": [2.5] * 4, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
STRAY = {
    "factor": 3.0,
    "attention_factor": 1.3,
    "attn_factor": 0.9,
    "extrapolation_factor": 0.5,
    "alpha": 1000.0,
    "beta_fast": 8.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
    "truncate": False,
    "low_freq_factor": 2.0,
    "short_factor": [1.0] * 4,
    "short_mscale": 1.2,
    "long_mscale": 1.4,
    "mrope_section": [1, 1, 2],
    "frequency_divisors": [2.0] * 4,
    "rope_percentage": 0.5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_other_kinds_change_nothing_and_are_named(kind):
    """Each against what transformers makes of the same dictionary; one that transformers reads, we read."""
    assert KEYS.keys() == KINDS.keys() == PARAMETERS.keys()
    for key, value in STRAY.items():
        parameters = {"rope_type": kind, **PARAMETERS[kind], key: value}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            spec = rope_from_hf(parameters, head_dim=8, max_position_embeddings=64, theta=500.0)
        named = [str(warning.message) for warning in said]
        assert named == [] if key in KEYS[kind] else len(named) == 1 and f"{key} = {value!r}" in named[0], (key, named)
        if kind == "default":  # transformers has no function for it
            assert spec == RopeSpec(head_dim=8, rotary_dim=8, base=500.0)
            continue
        config = LlamaConfig(
            hidden_size=16,
            num_attention_heads=2,
            max_position_embeddings=64,
            rope_parameters={**parameters, "rope_theta": 500.0},
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        ours = inverse_frequencies(spec, factor_set="short" if kind == "longrope" else None)
        assert ours == pytest.approx(frequencies.double().numpy(), rel=20 * EPS32), key
        assert attention_factor(spec) == pytest.approx(factor, rel=1e-12), key


def test_finetuned_is_no_reason_to_warn(recwarn):
    rope_from_hf({"type": "linear", "factor": 2.0, "finetuned": True}, head_dim=8, max_position_embeddings=64)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("parameters", "outer", "said", "expected"),
    [
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, {}, "rope_type counts", ("linear", 1e4, 8)),
        ({"rope_theta": 1e4}, {"theta": 1e6}, "10000.0 counts", ("default", 1e4, 8)),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, "0.5 counts", ("default", 1e4, 4)),
    ],
)
def test_of_two_values_the_one_that_transformers_takes_counts(parameters, outer, said, expected):
    with pytest.warns(UserWarning, match=said):
        spec = rope_from_hf(parameters, head_dim=8, max_position_embeddings=64, **outer)
    assert (spec.kind, spec.base, spec.rotary_dim) == expected


def test_the_outer_original_context_counts():
    parameters = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    with pytest.warns(UserWarning, match="32 counts"):
        spec = rope_from_hf(parameters, head_dim=8, max_position_embeddings=64, original_max_position_embeddings=32)
    assert spec.scaling.original_context == 32


@pytest.mark.parametrize(
    ("parameters", "outer", "message"),
    [
        ({"rope_type": "proportional"}, {}, "the types are default, linear"),
        ({"rope_type": "linear", "type": "ntk"}, {}, "no factor in the RoPE parameters"),
        ({"rope_type": "ntk", "type": "linear", "factor": 2.0}, {}, "rope_type 'ntk'"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, {}, "all layers of a model have one rotation"),
        ({"rope_type": "linear"}, {}, "no factor in the RoPE parameters"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 4}, {}, "no short_factors"),
        ({"rope_theta": []}, {}, r"rope_theta is \[\]: rope_theta is a finite number above 0"),
        ({}, {"theta": {}}, "rope_theta is {}"),
        (True, {}, "RoPE parameters True: they are a mapping"),
        ([1], {}, r"RoPE parameters \[1\]"),
        ({"rope_type": ["yarn"]}, {}, r"rope_type \"\['yarn'\]\""),
        ({"rope_type": "yarn", "factor": 1e308}, {}, "from 1e-30 to 1e30"),
        ({"rope_type": "yarn", "factor": [2.0]}, {}, r"factor is \(2.0,\)"),
        ({"rope_type": "yarn"}, {"original_max_position_embeddings": "8"}, "original_max_position_embeddings is '8'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, {}, "truncate is 'no': truncate is true or false"),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 4}, {}, "one number per pair"),
        ({}, {"partial_rotary_factor": 0.0}, "above 0"),
        ({}, {"partial_rotary_factor": 1.5}, "between 2 and head_dim"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parameters_that_describe_no_rotation_are_refused(parameters, outer, message):
    with pytest.raises(RopeError, match=message):
        rope_from_hf(parameters, head_dim=8, max_position_embeddings=64, **outer)


def test_older_files_are_read():
    """``type`` for ``rope_type``, ``su`` for longrope, theta beside the dictionary, nulls for absent keys."""
    parameters = {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0], "attention_factor": None}
    spec = rope_from_hf(
        parameters, head_dim=4, max_position_embeddings=131072, theta=1e4, original_max_position_embeddings=4096
    )
    assert spec.scaling == LongRope(
        factor=32.0, original_context=4096, short_factors=(1.0, 1.0), long_factors=(2.0, 3.0)
    )
    assert rope_from_hf(None, head_dim=4, max_position_embeddings=8) == RopeSpec(head_dim=4, rotary_dim=4)
