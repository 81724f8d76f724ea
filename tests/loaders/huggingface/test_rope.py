"""Rotary parameters of a config.json: where they are read, and logits equal to transformers' in odd cases too."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from config_json import DROPPED, config_json, metadata_of
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.loaders.huggingface.json_files import HuggingFaceError
from rooflama.models.rope.huggingface import rope_from_hf
from running_models import assert_parity, prefill_logits, running
from tiny_checkpoints import random_tokens, reference_logits, write_case


def test_rotary_parameters_arrive_whole_in_old_and_new_spelling():
    new = metadata_of("llama3.1")["llama.rope.huggingface"]
    parameters = config_json("llama3.1")["rope_parameters"]
    old_scaling = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    old = metadata_of(
        "llama3.1", rope_parameters=DROPPED, rope_theta=5e5, rope_scaling=old_scaling | {"type": "llama3"}
    )["llama.rope.huggingface"]
    specs = [rope_from_hf(**given, head_dim=32, max_position_embeddings=256) for given in (new, old)]
    assert specs[0] == specs[1]
    assert (specs[0].kind, specs[0].base, specs[0].scaling.factor) == ("llama3", 5e5, 8.0)


def test_phi3_as_it_was_published():
    """Type "su", with the original context outside the rotary parameters."""
    factors = {key: config_json("phi3-128k")["rope_parameters"][key] for key in ("short_factor", "long_factor")}
    published = {"rope_parameters": DROPPED, "rope_theta": 1e4, "rope_scaling": {"type": "su", **factors}}
    old, new = (metadata_of("phi3-128k", **changes)["phi3.rope.huggingface"] for changes in (published, {}))
    specs = [rope_from_hf(**given, head_dim=16, max_position_embeddings=256) for given in (new, old)]
    assert specs[0] == specs[1]
    assert (specs[1].kind, specs[1].scaling.original_context, specs[1].scaling.factor) == ("longrope", 32, 8.0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "qwen3",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attn_factor": 0.9},
            "attn",
        ),
        (
            "llama3",
            {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5, "alpha": 1000.0},
            "attention_factor",
        ),
        ("llama3", {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}, "original_max"),
        ("llama3", {"rope_type": "default", "factor": 8.0, "mrope_section": [2, 3, 3]}, "factor = 8.0, mrope_section"),
        ("llama3", {"factor": 8.0, "finetuned": True}, "'default'"),
        ("llama3", {"rope_type": "linear", "type": "yarn", "factor": 4.0}, "rope_type counts"),
        ("llama3", {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, "rope_theta is 500.0 in one place"),
    ],
)
@pytest.mark.usefixtures("numpy_backend")
def test_odd_rotary_parameters_are_read_as_transformers_reads_them(name, changes, said, tmp_path):
    """A warning names keys that transformers ignores; the logits equal those of transformers."""
    folder = write_case(name, tmp_path, "safetensors")
    config = config_json(name, rope_parameters=DROPPED, rope_scaling=changes, rope_theta=1e4)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(20)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    warned = pytest.warns(UserWarning, match=re.escape(said))
    with warned, read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        (logits,) = prefill_logits(runner, [tokens], 1024)
    assert_parity(logits, reference_logits(oracle.eval(), tokens), f"{name} with {changes}")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.usefixtures("numpy_backend")
def test_part_of_a_head_counts_only_where_the_type_rotates_parts(inside, tmp_path):
    part = {"partial_rotary_factor": 0.5}
    parameters = config_json("qwen3")["rope_parameters"]
    config = config_json("qwen3", rope_parameters=parameters | part) if inside else config_json("qwen3", **part)
    folder = write_case("qwen3", tmp_path, "safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(20)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    warned = pytest.warns(UserWarning, match=r"partial_rotary_factor is 0\.5")
    with warned, read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        (logits,) = prefill_logits(runner, [tokens], 1024)
    assert_parity(logits, reference_logits(oracle.eval(), tokens), "with a factor that does not count")
    with pytest.raises(HuggingFaceError, match=r"partial_rotary_factor 0\.5 with rope_type 'linear'"):
        metadata_of("qwen3", rope_parameters={"rope_type": "linear", "factor": 2.0, **part})


def test_rope_scaling_counts_before_rope_parameters():
    linear = {"rope_type": "linear", "factor": 4.0}
    with pytest.warns(UserWarning, match="differ: rope_scaling counts"):
        given = metadata_of("llama3", rope_scaling=linear, rope_theta=1e4)["llama.rope.huggingface"]
    assert given["rope_parameters"] == linear
    with pytest.raises(HuggingFaceError, match="rope_theta only in rope_parameters"):
        metadata_of("llama3", rope_scaling=linear)


def test_the_first_phi3_configs_say_yarn_and_mean_longrope():
    parameters = config_json("phi3-128k")["rope_parameters"]
    factors = {key: parameters[key] for key in ("short_factor", "long_factor")}
    changes = {"rope_parameters": DROPPED, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", **factors}}
    given = metadata_of("phi3-128k", **changes)["phi3.rope.huggingface"]
    spec = rope_from_hf(**given, head_dim=16, max_position_embeddings=256)
    assert (spec.kind, spec.scaling.original_context, spec.scaling.factor) == ("longrope", 32, 8.0)
