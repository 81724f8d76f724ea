"""Another rotation than the file's: each kind against transformers, the context it reaches, and what is refused."""

import re
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rooflama
from memory_checkpoints import checkpoint, config_of
from rooflama.models.rope.override import override_rope, parse_rope
from rooflama.models.rope.spec import KINDS, Llama3, RopeError, RopeSpec, Yarn
from rooflama.planning import plan_memory
from running_models import assert_parity
from tiny_checkpoints import random_tokens, reference_logits
from whole_checkpoints import write_file, write_folder

TRAINED = 256  # tokens
PAIRS = 4  # of a head of the case llama3
LISTS = {"short_factor": [1.0 + 0.05 * j for j in range(PAIRS)], "long_factor": [1.0 + 2 * j for j in range(PAIRS)]}
OVERRIDES = {
    "default": {"base": 500.0},
    "linear": {"factor": 4},
    "dynamic": {"factor": 4.0, "original_context": 32},
    "yarn": {"factor": 4, "original_context": 32, "beta_fast": 2, "attention_factor": 1.3},
    "longrope": {"factor": 8, "original_max_position_embeddings": 32, **LISTS},
    "llama3": {"factor": 8, "original_context": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4},
}
THEIRS = {"original_context": "original_max_position_embeddings", "base": "rope_theta"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder("llama3", tmp_path_factory.mktemp("override"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_file("llama3", tmp_path_factory.mktemp("override") / "tiny.gguf")


def load(path, **options):
    return rooflama.load(path, device="cpu", progress=False, **options)


def theirs(folder, kind, values, tokens):
    """transformers' logits of the folder's weights with another rotation."""
    config = AutoConfig.from_pretrained(folder)
    if kind == "dynamic":
        config.max_position_embeddings = values["original_context"]
    theta = config.rope_parameters["rope_theta"]
    given = {THEIRS.get(key, key): value for key, value in values.items()}
    config.rope_parameters = {"rope_type": kind, "rope_theta": theta, **given}
    oracle = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return reference_logits(oracle.eval(), tokens)


@pytest.mark.usefixtures("numpy_backend")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_transformers(kind, folder, file):
    tokens = random_tokens(40)
    expected = theirs(folder, kind, OVERRIDES[kind], tokens)
    for path in (folder, file):
        with load(path, rope={"kind": kind, **OVERRIDES[kind]}, max_context=64) as model:
            assert model.config.rope.kind == kind
            assert_parity(model.logits(tokens), expected, f"{kind} from {path.name}")


@pytest.mark.usefixtures("numpy_backend")
def test_dynamic_scaling_goes_beyond_the_trained_context(folder):
    """As far as max_context says, without a warning: it sets no limit of its own."""
    tokens = random_tokens(TRAINED + 40)
    expected = theirs(folder, "dynamic", {"factor": 2.0, "original_context": TRAINED}, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder, rope="kind=dynamic,factor=2", max_context=TRAINED + 50)
    with model:
        assert model.config.context_length == TRAINED
        assert_parity(model.logits(tokens), expected, "beyond the trained context")
        generation = model.generate(tokens, max_new_tokens=4)
        assert generation.timings.prompt_tokens == len(tokens)


@pytest.mark.usefixtures("numpy_backend")
def test_a_context_beyond_the_trained_one_loads_with_a_warning(file):
    with pytest.warns(UserWarning, match=r"300 tokens is more than the 256 .*\(default\) stretches to"):
        model = load(file, max_context=300)
    with model:
        assert model.max_context == 300
        assert model.logits(random_tokens(300)).isfinite().all()
    with pytest.warns(UserWarning, match=r"1,025 tokens is more than the 1,024 .*\(yarn\)"):
        plan_memory(file, device="cpu", context=4 * TRAINED + 1, rope={"kind": "yarn", "factor": 4})


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"kind": "yarn", "factor": 4}, 4 * TRAINED),
        ({"kind": "yarn", "factor": 4, "original_context": 32}, 128),
        ({"kind": "linear", "factor": 2.5}, 640),
        ({"kind": "dynamic", "factor": 8}, TRAINED),
        ({"base": 1e6}, TRAINED),
        ({"kind": "default"}, TRAINED),
    ],
)
def test_the_context_and_the_plan_follow(rope, context, file):
    plan = plan_memory(file, device="cpu", rope=rope)
    assert plan.context == plan.config.context_length == context
    assert dict(rooflama.inspect(file, rope=rope).rows())["context"] == f"{context:,} tokens"
    tables = {line.name: line.nbytes for line in plan.lines}["rotary tables"]
    assert tables == (32 * (context + 1) if rope.get("kind") == "dynamic" else 8 * context) * PAIRS


def test_tables_of_dynamic_scaling_do_not_grow_with_the_context(file):
    plans = [plan_memory(file, device="cpu", context=n, rope="kind=dynamic,factor=2") for n in (4096, 2**20)]
    first, second = ({line.name: line.nbytes for line in plan.lines}["rotary tables"] for plan in plans)
    assert first == second == 32 * (2048 + 1) * PAIRS


def test_the_files_own_kind_keeps_its_parameters():
    config = config_of(checkpoint("qwen2-yarn", {"rope.scaling.yarn_beta_fast": 16.0}))
    assert config.rope.scaling == Yarn(factor=4.0, original_context=32, beta_fast=16.0)
    for rope in ({"factor": 16}, {"kind": "yarn", "factor": 16}):
        changed = override_rope(config, rope)
        assert changed.rope.scaling == Yarn(factor=16, original_context=32, beta_fast=16.0)
        assert changed.context_length == 512
    other = override_rope(config, {"kind": "linear", "factor": 2, "base": 1e3})
    assert (other.rope.kind, other.rope.base, other.context_length) == ("linear", 1e3, 64)
    assert override_rope(config, {"kind": "default"}).context_length == 32
    assert override_rope(config, {}) == config


def test_a_kind_replaces_rope_freqs_and_no_kind_keeps_them():
    config = config_of(checkpoint("llama3.1"))
    assert config.rope.frequency_divisors is not None
    assert override_rope(config, {"base": 1e6}).rope.frequency_divisors == config.rope.frequency_divisors
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32}
    rope = override_rope(config, {"kind": "llama3", **scaling}).rope
    assert rope == RopeSpec(head_dim=32, rotary_dim=32, base=5e5, scaling=Llama3(**scaling))


def test_numbers_of_numpy_and_torch_are_numbers():
    config = config_of(checkpoint("llama3"))
    plain = {"kind": "longrope", "factor": 8.0, "original_context": 32, **LISTS}
    arrays = plain | {"factor": np.float32(8), "original_context": torch.tensor(32)}
    arrays |= {
        "short_factor": np.array(LISTS["short_factor"]),
        "long_factor": torch.tensor(LISTS["long_factor"]).double(),
    }
    assert override_rope(config, arrays) == override_rope(config, plain)


@pytest.mark.usefixtures("numpy_backend")
def test_part_of_a_head_rotates_alike_from_both_formats(folder, file):
    """The file's pairs are neighbours, the folder's are halves of the head."""
    tokens = random_tokens(20)
    logits = []
    for path in (folder, file):
        with load(path, rope={"partial_rotary_factor": 0.5}) as model:
            assert model.config.rope.rotary_dim == 4
            logits.append(model.logits(tokens))
    assert_parity(logits[0], logits[1], "from a folder against from a file", 2e-6)
    assert override_rope(config_of(checkpoint("llama3")), {"rotary_dim": 4}).rope.rotary_dim == 4


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"kind": "ntk", "factor": 2}, "the kinds are default, linear, dynamic, yarn, longrope, llama3"),
        ({"kind": ["yarn"]}, "the kinds are"),
        (
            {"kind": "yarn", "alpha": 2},
            "keys of kind 'yarn' are kind, base, rotary_dim, partial_rotary_factor, ",
        ),
        ({"factor": 2}, "rope key 'factor': the keys of kind 'default' are"),
        ({"kind": "linear"}, "needs factor"),
        ({"kind": "llama3", "factor": 8}, "needs low_freq_factor, high_freq_factor"),
        ({"kind": "longrope", "factor": 8}, "needs short_factors, long_factors"),
        ({"kind": "longrope", "factor": 8, "short_factors": [1.0], "long_factors": [1.0]}, "there are 4"),
        ({"kind": "yarn", "factor": "4"}, "factor is '4'"),
        ({"kind": "yarn", "factor": -1}, "above 0"),
        ({"kind": "yarn", "factor": float("nan")}, "factor is nan"),
        ({"kind": "yarn", "rope_type": "linear", "factor": 4}, "'kind' twice"),
        ({"kind": "yarn", "factor": 4, "original_context": 2.5}, "original_context counts tokens: it is a whole"),
        ({"base": 0.5}, "the base is above 1"),
        ({"rotary_dim": 3}, "rotary_dim is even"),
        ({"rotary_dim": 4.0}, "whole number"),
        ({"rotary_dim": 4, "partial_rotary_factor": 0.5}, "they state the same number"),
        ({1: 2}, "rope key 1"),
        (["yarn"], "it is a mapping"),
        ("yarn", "KEY=VALUE"),
        ("kind=yarn,,factor=4", "KEY=VALUE"),
        ("", "KEY=VALUE"),
        ("{", "KEY=VALUE"),
    ],
)
def test_what_describes_no_rotation_is_refused(rope, message):
    with pytest.raises(RopeError, match=re.escape(message)):
        override_rope(config_of(checkpoint("llama3")), rope)


def test_a_reach_beyond_all_numbers_is_bounded(file):
    plan = plan_memory(file, device="cpu", rope={"kind": "yarn", "factor": 1e30}, limit="1GiB")
    assert plan.context == 2**31 - 1
    assert not plan.fits


def test_text_is_read_as_values():
    assert parse_rope("kind=yarn, factor=4,truncate=false, beta_fast=1e1") == {
        "kind": "yarn",
        "factor": 4,
        "truncate": False,
        "beta_fast": 10.0,
    }
    assert parse_rope('{"kind": "longrope", "short_factors": [1, 2]}') == {"kind": "longrope", "short_factors": [1, 2]}
