"""Hugging Face folders with arbitrary JSON: each is read, or refused with a short error."""

import contextlib
import json
import struct

import pytest

from rooflama import RooflamaError
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.loaders.text.folder import read_folder_tokenizer
from rooflama.models import CheckpointReader, adapter_for, rope_tables
from rooflama.models.rope.spec import choose_factor_set
from tiny_checkpoints import write_case
from whole_checkpoints import write_folder

ODD = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 1e308, 5e-324, 2**64, 10**30, 10**400, "", "x", "\ud800",
    [], [1], [[]], [{}], ["\ud800"], {}, {"a": 1},
]  # fmt: skip
LONG = "x" * 2_000_000
LONGEST_ERROR = 4_000  # characters


def changed(file, *path):
    """Write the JSON file with each odd value in turn at ``path``."""
    before = json.loads(file.read_text())
    for value in ODD:
        content = json.loads(json.dumps(before))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_text(json.dumps(content))
        yield value
    file.write_text(json.dumps(before))


def read_config(folder):
    """Read all of a folder's config that is read before the weights."""
    with contextlib.suppress(RooflamaError), read_safetensors(folder) as checkpoint:
        architecture = checkpoint.metadata["general.architecture"]
        rope = adapter_for(architecture).read_config(CheckpointReader(checkpoint)).rope
        rope_tables(rope, 4, factor_set=choose_factor_set(rope, 4))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama3.1", "llama-linear", "qwen2-window", "qwen2-yarn", "phi3-128k"])
def test_odd_values_in_config_json(name, tmp_path):
    folder = write_case(name, tmp_path, "safetensors")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if name == "qwen2-window":
        config["layer_types"] = None
        file.write_text(json.dumps(config))
    inner = [("rope_parameters", key) for key in {**config["rope_parameters"], "type": 0, "beta_slow": 0}]
    more = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "layer_types")
    for path in [*((key,) for key in {**config, **dict.fromkeys(more)}), *inner]:
        for _value in changed(file, *path):
            read_config(folder)


def test_odd_values_in_the_tokenizers_files(tmp_path):
    folder = write_folder("llama3", tmp_path / "llama3")
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = {str(token["id"]): token for token in content["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        (folder / name).write_text("{}")
    first = next(iter(tokens))
    keys = ["bos_token", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "chat_template"]
    paths = [("tokenizer_config.json", key) for key in [*keys, "add_bos_token"]]
    paths += [("tokenizer_config.json", "added_tokens_decoder", key) for key in (first, f"0{first}", "9" * 5000, "x")]
    paths += [("tokenizer_config.json", "added_tokens_decoder", first, key) for key in tokens[first]]
    paths += [("special_tokens_map.json", "eos_token"), ("special_tokens_map.json", "extra_special_tokens")]
    paths += [
        ("generation_config.json", "eos_token_id"),
        ("config.json", "bos_token_id"),
        ("config.json", "model_type"),
    ]
    paths += [("tokenizer.json", key) for key in content]
    for file, *path in paths:
        for _value in changed(folder / file, *path):
            with contextlib.suppress(RooflamaError):
                read_folder_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for text in ("added", "\ud800"):
        for _value in changed(folder / "added_tokens.json", text):
            with contextlib.suppress(RooflamaError):
                read_folder_tokenizer(folder)


@pytest.mark.parametrize(
    "header",
    [
        {LONG: 1},
        {LONG: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": LONG}},
        {"a": {"dtype": "F32", "shape": [LONG]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": LONG}},
    ],
    ids=["name", "unknown", "dtype", "shape", "offsets"],
)
def test_errors_about_long_headers_are_short(header, tmp_path, monkeypatch):
    monkeypatch.setattr("rooflama.loaders.huggingface.safetensors.SMALL_HEADER", 2**24)
    folder = write_case("llama3", tmp_path, "safetensors")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(RooflamaError) as caught:
        read_safetensors(folder)
    assert len(str(caught.value)) < LONGEST_ERROR


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": LONG}),
        ("config.json", {"model_type": {"a": LONG}}),
        ("model.safetensors.index.json", {"weight_map": {"a": LONG}}),
        ("model.safetensors.index.json", {"weight_map": {"a": f"{LONG}.safetensors"}}),
    ],
)
def test_errors_about_long_values_are_short(file, content, tmp_path):
    folder = write_case("llama3", tmp_path, "safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(RooflamaError) as caught:
        read_safetensors(folder)
    assert len(str(caught.value)) < LONGEST_ERROR


def test_a_long_key_that_is_not_read_is_named_short(tmp_path):
    folder = write_case("llama3", tmp_path, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, LONG: False}))
    with pytest.warns(UserWarning, match="does not define") as caught:
        read_safetensors(folder).close()
    assert len(str(caught[0].message)) < LONGEST_ERROR
    for odd in ({LONG: 1}, {"a": LONG}, {"a": [LONG]}, {"no_rope_layers": [LONG]}):
        (folder / "config.json").write_text(json.dumps({**config, **odd}))
        with pytest.raises(RooflamaError, match="result") as refused:
            read_safetensors(folder)
        assert len(str(refused.value)) < LONGEST_ERROR
