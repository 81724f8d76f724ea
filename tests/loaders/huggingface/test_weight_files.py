"""Folders as published: which files and tensors are read, compared with transformers if it loads the case."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.loaders.huggingface.json_files import HuggingFaceError
from running_models import assert_parity, prefill_logits, running
from tiny_checkpoints import random_tokens, reference_logits, write_case

pytestmark = pytest.mark.usefixtures("numpy_backend")
TOKENS = random_tokens(9)
INDEX = "model.safetensors.index.json"
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return write_case("llama3", tmp_path / "llama3", "safetensors")


@pytest.fixture
def tied(tmp_path):
    return write_case("llama3.2-tied", tmp_path / "tied", "safetensors")


def store(folder, name, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})


def change(folder, edit):
    """Rewrite model.safetensors after ``edit`` has changed the dict of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    store(folder, "model.safetensors", tensors)


def shard(folder, *, factor=1.0, also=()):
    """Write two shards and their index beside model.safetensors; ``also``: tensors that both shards hold."""
    tensors = {name: tensor * factor for name, tensor in load_file(folder / "model.safetensors").items()}
    half = len(tensors) // 2
    files = {name: f"model-{1 + (i >= half):05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        store(folder, file, {name: tensors[name] for name in tensors if files[name] == file or name in also})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return [folder / file for file in sorted(set(files.values()))]


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(folder):
    with read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        return prefill_logits(runner, [TOKENS], 1024)[0]


def agree(folder, said=""):
    """Check for the logits of transformers, and for one warning that matches ``said``; if it is empty, for none."""
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = logits_of(folder)
    assert_parity(logits, reference_logits(oracle.eval(), TOKENS), str(folder))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(said), messages
    assert not said or re.search(said, messages[0]), messages


# Files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("consolidated.safetensors", ""),
        ("consolidated-00001-of-00002.safetensors", ""),
        ("model.fp16.safetensors", r"read from model\.safetensors; not read is model\.fp16\.safetensors$"),
        ("adapter_model.safetensors", r"not read is adapter_model\.safetensors$"),
        ("a_checkpoint_of_training.safetensors", r"not read is a_checkpoint_of_training\.safetensors$"),
    ],
)
def test_other_files_beside_the_model_are_not_read(name, said, folder):
    store(folder, name, {"base_model.model.q.lora_A.weight": torch.zeros(2, 2), NORM: torch.ones(3)})
    agree(folder, said)


def test_a_single_file_comes_before_the_index(folder):
    shards = shard(folder, factor=0.5)
    agree(folder, r"not read are model-00001-of-00002.safetensors, .*, model\.safetensors\.index\.json$")
    for path in shards:
        path.unlink()
    agree(folder, r"not read is model\.safetensors\.index\.json$")
    for damaged in ("{}", "[", '{"weight_map": 3}'):
        (folder / INDEX).write_text(damaged)
        agree(folder, r"not read is model\.safetensors\.index\.json$")


def test_the_index_decides_where_there_is_no_single_file(folder):
    shard(folder, factor=0.5)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    agree(folder)
    store(folder, "model-00003-of-00003.safetensors", {"older": torch.ones(2)})
    agree(folder, r"read from model-00001-of-00002.safetensors, .*; not read is model-00003-of-00003\.safetensors$")


def test_a_dangling_link_is_no_single_file(folder):
    shard(folder, factor=0.5)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    agree(folder, r"not read is model\.safetensors$")


def test_the_config_may_name_the_file(folder):
    shard(folder, factor=0.5)
    (folder / INDEX).rename(folder / "half.safetensors.index.json")
    for name in ("half.safetensors.index.json", "other.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        set_config(folder, transformers_weights=name)
        agree(folder, "the weights are read from")
    for name, message in [
        ("../other.safetensors", "Do not use this checkpoint"),
        ("config.json", "it names a safetensors file or an index beside config.json"),
        (3, "transformers_weights 3"),
        ("gone.safetensors", "gone.safetensors is missing"),
    ]:
        set_config(folder, transformers_weights=name)
        with pytest.raises(HuggingFaceError, match=message):
            read_safetensors(folder)


@pytest.mark.filterwarnings("ignore:.* not read ")
def test_files_without_an_index_are_read_where_there_is_no_choice(folder):
    first, second = shard(folder)
    expected = logits_of(folder)
    (folder / INDEX).unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert torch.equal(logits_of(folder), expected)
    second.unlink()
    with pytest.raises(HuggingFaceError, match=r"model-00002-of-00002\.safetensors missing"):
        read_safetensors(folder)
    first.unlink()
    store(folder, "adapter_model.safetensors", {"lora": torch.ones(1)})
    assert torch.equal(logits_of(folder), expected)
    shutil.copy(folder / "weights.safetensors", folder / "weights.fp16.safetensors")
    with pytest.raises(HuggingFaceError, match=r"weights\.fp16\.safetensors, weights\.safetensors, and no model\.saf"):
        read_safetensors(folder)


def test_a_folder_of_an_adapter_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(HuggingFaceError, match="no safetensors file"):
        read_safetensors(folder)
    store(folder, "adapter_model.safetensors", {"lora": torch.ones(1)})
    with pytest.raises(HuggingFaceError, match=r"an adapter .* without its model: .* Merge it into its model first"):
        read_safetensors(folder)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(HuggingFaceError, match=r"config\.json: no such file"):
        read_safetensors(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "the files lie beside the index"),
        ({"weight_map": {"a": "/etc/passwd"}}, "the files lie beside the index"),
        ({"weight_map": {"a": "model-2.safetensors"}}, "model-2.safetensors is missing"),
    ],
)
def test_index_refused(index, message, folder):
    (folder / INDEX).write_text(json.dumps(index))
    if "beside" in message:  # even if it is not read
        with pytest.raises(HuggingFaceError, match=message):
            read_safetensors(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(HuggingFaceError, match=re.escape(message)):
        read_safetensors(folder)


def test_a_tensor_in_two_files_is_the_same_in_both(folder):
    first, _ = shard(folder, also=[NORM, OUTPUT])
    (folder / "model.safetensors").unlink()
    agree(folder, "model-00001-of-00002.safetensors and .* hold the same 2 tensors, of which one copy is read")
    for other in (torch.zeros(48), torch.ones(47), torch.ones(48, dtype=torch.float16)):
        tensors = load_file(first)
        store(folder, first.name, tensors | {NORM: other})
        with pytest.raises(
            HuggingFaceError, match=r"norm\.weight' a second time, with other values than in model-00001"
        ):
            read_safetensors(folder)
        store(folder, first.name, tensors)


# Tensors


def test_a_tied_weight_under_its_other_name(tied):
    change(tied, lambda tensors: tensors.update({OUTPUT: tensors.pop(EMBEDDING)}))
    agree(tied)


def test_a_tied_weight_that_is_stored_twice(tied):
    change(tied, lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING].clone()}))
    agree(tied)
    with read_safetensors(tied) as checkpoint:
        assert "output.weight" not in checkpoint.tensors


@pytest.mark.parametrize("row", [0, -1])
def test_a_tied_weight_that_is_stored_twice_and_differs(row, tied, monkeypatch):
    """transformers uses both; a single different number suffices, wherever it is."""
    monkeypatch.setattr("rooflama.loaders.huggingface.folder.CHUNK", 1000)

    def differ(tensors):
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
        tensors[OUTPUT][row, row] += 5.0

    change(tied, differ)
    agree(tied, r"tie_word_embeddings is true, but lm_head\.weight .* differs from the embedding")


def test_a_missing_output_is_refused_where_it_is_not_tied(folder):
    change(folder, lambda tensors: tensors.pop(OUTPUT))
    with pytest.raises(HuggingFaceError, match=r"no lm_head\.weight: tie_word_embeddings is not true"):
        read_safetensors(folder)


@pytest.mark.parametrize("names", [[NORM], None])
def test_names_without_the_prefix_of_the_model(names, folder):
    def strip(tensors):
        for name in names or list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(folder, strip)
    agree(folder)
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(48)}))
    with pytest.raises(HuggingFaceError, match=r"tensors 'model\.norm\.weight' and 'norm\.weight'"):
        read_safetensors(folder)


@pytest.mark.parametrize(
    "leftover",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.masked_bias",
        "model.embeddings.position_ids",
        "v_head.summary.weight",
    ],
)
def test_leftovers_do_not_count(leftover, folder):
    change(folder, lambda tensors: tensors.update({leftover: torch.full((8,), 7, dtype=torch.int64)}))
    agree(folder)


@pytest.mark.parametrize("names", [[NORM, "model.layers.0.mlp.up_proj.weight"], None])
def test_float64_is_rounded_to_float32(names, folder):
    def widen(tensors):
        for name in names or list(tensors):
            tensors[name] = tensors[name].double() * (1 + 2**-40)

    with read_safetensors(folder) as checkpoint:
        before = {name: (checkpoint.data(name).tobytes(), info) for name, info in checkpoint.tensors.items()}
    change(folder, widen)
    agree(folder, r" and \d+ other tensors: float64, read as float32$")
    with pytest.warns(UserWarning, match="float64"):
        opened = read_safetensors(folder)
    with opened as checkpoint:
        for name, info in checkpoint.tensors.items():
            data = checkpoint.data(name)
            assert (info.ggml_type, info.shape, info.nbytes) == ("F32", before[name][1].shape, data.nbytes)
            assert not data.flags.writeable
            assert len(data) == (info.shape[0] if len(info.shape) == 2 else 1)
            np.testing.assert_array_equal(data.view(np.float32).ravel(), np.frombuffer(before[name][0], np.float32))


def test_other_dtypes_are_refused(folder):
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int32)}))
    with pytest.raises(HuggingFaceError, match="has dtype I32: weights are F32, F16, BF16, F64"):
        read_safetensors(folder)
