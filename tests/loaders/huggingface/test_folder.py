"""Hugging Face folders: equal bytes to the safetensors library, and every rule for files and config."""

import contextlib
import copy
import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GraniteConfig

from config_json import DROPPED, config_json, metadata_of, tensor_names
from rooflama.loaders.huggingface import config as hf_config
from rooflama.loaders.huggingface.config import gguf_metadata, gguf_names
from rooflama.loaders.huggingface.folder import read_safetensors
from rooflama.loaders.huggingface.json_files import HuggingFaceError
from rooflama.models import CheckpointReader, adapter_for
from running_models import assert_parity, prefill_logits, running
from tiny_checkpoints import SIZES, cases, gguf_name, module, random_tokens, reference_logits, write_case


@pytest.mark.parametrize(
    ("name", "dtype", "shard_size"),
    [
        ("llama-biases", torch.float32, "5GB"),
        ("qwen2-tied-group7", torch.float16, "40KB"),
        ("phi4-mini", torch.bfloat16, "30KB"),
        ("qwen3", torch.float32, "60KB"),
    ],
)
def test_bytes_equal_the_librarys(name, dtype, shard_size, tmp_path):
    copy.deepcopy(module(name)).to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size != "5GB")
    seen = set()
    with read_safetensors(tmp_path) as checkpoint:
        for file in files:
            with safe_open(file, "pt") as expected:
                for stored in expected.keys():  # noqa: SIM118 (not a mapping)
                    tensor = expected.get_tensor(stored)
                    info = checkpoint.tensors[gguf_name(stored)]
                    data = checkpoint.data(gguf_name(stored))
                    assert info.shape == tuple(tensor.shape)
                    assert info.n_elements * tensor.element_size() == info.nbytes == data.nbytes
                    assert len(data) == (len(tensor) if tensor.ndim == 2 else 1)
                    assert data.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
                    assert not data.flags.writeable
                    seen.add(gguf_name(stored))
        assert seen == set(checkpoint.tensors)
        assert {info.ggml_type for info in checkpoint.tensors.values()} == {
            {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        }
    with pytest.raises(HuggingFaceError, match="is closed"):
        checkpoint.data("token_embd.weight")


# Files

FORMAT = "the header follows the safetensors format"  # the rule in errors that come from the library


def one_tensor(header=None, *, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def folder(tmp_path):
    return write_case("llama3", tmp_path, "safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the header lies inside the file"),
        (bytes(7), "the header lies inside the file"),
        (one_tensor({}, length=2**63), "the header lies inside the file"),
        (one_tensor({}, length=40), "the header lies inside the file"),
        (one_tensor(b"{"), FORMAT),
        (one_tensor(b"\xff\xfe"), FORMAT),
        (one_tensor(b"[" * 100_000), FORMAT),
        (one_tensor(b'{"a": ' + b"9" * 5000 + b"}"), FORMAT),
        (one_tensor(b"[]"), FORMAT),
        (one_tensor(b'{"a": {}, "a": {}}'), FORMAT),
        (one_tensor(f'{{"a": {json.dumps(entry("F16", (4,)))}, "a": {json.dumps(entry())}}}'.encode()), "occurs twice"),
        (one_tensor(f'{{"a": {json.dumps(entry())}, "\\u0061": {json.dumps(entry())}}}'.encode()), "occurs twice"),
        (one_tensor({"a": 1}), FORMAT),
        (one_tensor({"a": entry("F3")}), FORMAT),
        (one_tensor({"a": entry(["F32"])}), FORMAT),
        (one_tensor({"a": entry(shape=(-2, -1))}), FORMAT),
        (one_tensor({"a": entry(shape=(2.0,))}), FORMAT),
        (one_tensor({"a": entry(shape=(True,))}), FORMAT),
        (one_tensor({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), FORMAT),
        (one_tensor({"a": entry(offsets=(0,))}), FORMAT),
        (one_tensor({"a": entry(offsets=(-8, 0))}), FORMAT),
        (one_tensor({"a": entry(offsets=(8, 0))}), FORMAT),
        (one_tensor({"a": entry(shape=(2**40, 2**40))}), FORMAT),
        (one_tensor({"a": entry(shape=(2, *[1] * 8))}), "has no such tensor"),
        (one_tensor({"a": entry(shape=[10**39] * 8)}), FORMAT),
        (one_tensor({"a": entry(shape=(10**40,))}), FORMAT),
        (one_tensor({"a": entry(offsets=(8, 16))}), FORMAT),
        (one_tensor({"a": entry(), "b": entry()}), FORMAT),
        (one_tensor({"a": entry()}, data=bytes(9)), FORMAT),
        (one_tensor({"a": entry()}, data=bytes(7)), FORMAT),
        (one_tensor({"a": entry()}), "tensor 'a'"),
        (one_tensor({"model.norm.weight": entry("I32"), "lm_head.weight": entry("F32", (0,), (8, 8))}), "dtype I32"),
        (one_tensor({"model.norm.weight": entry("F8_E4M3", (8,)), "lm_head.weight": entry("F32", (0,), (8, 8))}), "F8"),
    ],
)
def test_damaged_files_are_refused(content, message, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(HuggingFaceError, match=re.escape(message)):
        read_safetensors(folder)


def test_headers_of_more_than_a_mebibyte_are_a_small_part_of_the_file(folder):
    """Otherwise 14 MiB of empty lists would take 400 MiB of memory."""
    path = folder / "model.safetensors"
    nbytes = 16 * (2**20 + 1) - 8 - (2**20 + 1)
    header = json.dumps({"a": entry("U8", (nbytes,), (0, nbytes))}).encode().ljust(2**20 + 1)
    path.write_bytes(one_tensor(header, data=bytes(nbytes)))
    with pytest.raises(HuggingFaceError, match="has no such tensor"):
        read_safetensors(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HuggingFaceError, match="of more than 1048576 is at most a sixteenth of its file"):
        read_safetensors(folder)


def test_every_truncation_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for size in [*range(0, 200, 7), len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(HuggingFaceError):
            read_safetensors(folder)


# Configs


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"model_type": "mamba"}, "the types are llama, mistral, qwen2, qwen3, phi3"),
        ("llama3", {"model_type": DROPPED}, "model_type None"),
        ("llama3", {"model_type": ["llama"]}, "model_type ['llama']"),
        ("llama3", {"rms_norm_eps": DROPPED, "hidden_size": DROPPED}, "no hidden_size, rms_norm_eps"),
        ("mistral-window", {"sliding_window": DROPPED}, "no sliding_window"),
        ("qwen3", {"head_dim": DROPPED}, "no head_dim"),
        ("phi3-128k", {"original_max_position_embeddings": DROPPED}, "no original_max_position_embeddings"),
        ("phi3-4k", {"layer_types": ["full_attention"] * 2}, "layer_types ['full_attention', 'full_attention']"),
        ("llama3", {"hidden_act": "gelu"}, "hidden_act 'gelu': model_type 'llama' does not read it, and it changes"),
        ("llama3", {"quantization_config": {"bits": 4}}, "a quantization_config"),
        ("llama3", {"attention_bias": True}, "blk.0.attn_q.bias is not there"),
        ("llama-biases", {"attention_bias": False}, "blk.0.attn_q.bias is there"),
        ("llama-biases", {"mlp_bias": False}, "blk.0.ffn_down.bias is there"),
        ("llama3.2-tied", {"tie_word_embeddings": False}, "no lm_head.weight"),
        ("llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters that differ"),
        ("qwen2-window", {"layer_types": ["chunked_attention"] * 3}, "layers attend fully or in a sliding window"),
        ("qwen2-window", {"layer_types": 3}, "layers attend fully or in a sliding window"),
        ("qwen2-window", {"layer_types": [[], []]}, "layers attend fully or in a sliding window"),
        ("qwen2-window", {"layer_types": None, "max_window_layers": DROPPED}, "without max_window_layers"),
        ("qwen2-window", {"layer_types": None, "max_window_layers": "1"}, "max_window_layers '1' of num_hidden_layers"),
        ("qwen2-window", {"layer_types": None, "num_hidden_layers": None}, "of num_hidden_layers None"),
        ("qwen2-window", {"layer_types": None, "num_hidden_layers": 1.5}, "of num_hidden_layers 1.5"),
        ("qwen2-window", {"layer_types": None, "num_hidden_layers": 2**40}, "of at most 10000 layers"),
    ],
)
def test_configs_refused(name, changes, message):
    with pytest.raises(HuggingFaceError, match=re.escape(message)):
        metadata_of(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("qwen2-window", {}, (0, 9, 9)),
        ("qwen2-window", {"layer_types": None}, (0, 9, 9)),
        ("qwen2-window", {"layer_types": None, "max_window_layers": 2}, (0, 0, 9)),
        ("qwen2-window", {"layer_types": None, "max_window_layers": 0}, (9, 9, 9)),
        ("qwen2-window", {"use_sliding_window": False}, (0, 0, 0)),
        ("qwen2-window", {"use_sliding_window": DROPPED}, (0, 0, 0)),
        ("mistral-window", {}, (9, 9)),
        ("mistral-window", {"sliding_window": None}, (0, 0)),
        ("phi3-4k", {}, (9, 9)),
        ("phi3-4k", {"sliding_window": None}, (0, 0)),
    ],
)
def test_windows(name, changes, windows, tmp_path):
    folder = write_case(name, tmp_path, "safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(name, **changes)))
    with read_safetensors(folder) as checkpoint:
        config = adapter_for(checkpoint.metadata["general.architecture"]).read_config(CheckpointReader(checkpoint))
    assert config.sliding_windows == windows


@pytest.mark.parametrize(
    ("name", "changes", "unread"),
    [
        ("mistral-window", {"use_sliding_window": False}, "use_sliding_window"),
        ("mistral-window", {"layer_types": ["full_attention", "sliding_attention"]}, None),
        ("phi3-4k", {"use_sliding_window": False}, "use_sliding_window"),
        ("llama3", {"use_sliding_window": False, "max_window_layers": 1}, "max_window_layers, sliding_window, use_sli"),
        ("llama3", {}, "sliding_window"),
        ("llama3", {"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, "sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}, None),
    ],
)
@pytest.mark.usefixtures("numpy_backend")
def test_windows_of_odd_configs_are_those_of_transformers(name, changes, unread, tmp_path):
    """A key that the model type does not define changes nothing, and a warning names it."""
    folder = write_case(name, tmp_path, "safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(name, **{"sliding_window": 9, **changes})))
    tokens = random_tokens(20)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    said = pytest.warns(UserWarning, match=f"not read: {unread}") if unread else contextlib.nullcontext()
    with said, read_safetensors(folder) as checkpoint, running(checkpoint) as runner:
        (logits,) = prefill_logits(runner, [tokens], 1024)
    assert_parity(logits, reference_logits(oracle.eval(), tokens), f"{name} with {changes}")


@pytest.mark.parametrize("value", [None, 0])
def test_biases_that_are_null_are_none(value):
    assert metadata_of("llama3", attention_bias=value, mlp_bias=value) == metadata_of("llama3")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.w1.weight",
        "model.layers.0.self_attn.q_proj.scales",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.\u0660.mlp.up_proj.weight",
        f"model.layers.{'1' * 5000}.mlp.up_proj.weight",
    ],
    ids=lambda name: name[:40],
)
def test_unknown_tensors_are_refused(name):
    with pytest.raises(HuggingFaceError, match="nothing is dropped silently"):
        gguf_names(config_json("llama3"), [*tensor_names("llama3"), name])


def test_two_tensors_that_are_one_in_gguf_are_refused():
    stored = [*tensor_names("llama3"), "model.layers.1.mlp.gate_up_proj.weight"]
    with pytest.raises(HuggingFaceError, match=r"gate_up_proj\.weight' and 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        gguf_names(config_json("llama3"), stored)


@pytest.mark.parametrize(
    "changes",
    [
        {"logits_scaling": 8.0},
        {"logits_scaling": 0},
        {"embedding_multiplier": 12},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.0078125},
        {"attention_multiplier": 1.0},
        {"query_pre_attn_scalar": 256},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"use_qk_norm": True},
        {"no_rope_layers": [1, 0]},
        {"hidden_activation": ["silu"]},
        {"clip_qkv": 0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"clip_qkv": 8},
        {"is_causal": False},
        {"num_local_experts": 8},
        {"per_layer_config": {"0": {"intermediate_size": 8}}},
        {"scaling_of_my_own": 3},
    ],
    ids=str,
)
def test_keys_that_may_change_the_logits_are_refused(changes):
    (key,) = changes
    with pytest.raises(HuggingFaceError, match=f"{key} .*: model_type 'llama' does not read it, and it "):
        metadata_of("llama3", **changes)


def test_a_family_with_multipliers_needs_more_than_one_line(monkeypatch):
    """Granite added with one line, as in the guide: its logits would be 8 times too large."""
    monkeypatch.setitem(hf_config.FAMILIES, "granite", hf_config.HFFamily("llama"))
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    config = json.loads(GraniteConfig(**sizes, logits_scaling=8.0, residual_multiplier=0.22).to_json_string())
    with pytest.raises(HuggingFaceError) as refused:
        gguf_metadata(config, (), name="granite")
    assert "logits_scaling 8.0" in refused.value.found
    assert "residual_multiplier 0.22" in refused.value.found
    assert "attention_multiplier 1.0" in refused.value.found  # not 1 / sqrt(head_dim)
    assert "embedding_multiplier" not in refused.value.found


def test_keys_that_cannot_change_the_logits_are_passed_over(recwarn):
    neutral = {
        "logits_scaling": 1.0, "embedding_multiplier": 1, "attn_logit_softcapping": None, "hidden_activation": "silu",
        "activation": "swiglu", "no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2, "num_local_experts": 0,
        "attention_bias": False, "full_attn_mod": 1, "use_mrope": False, "unsloth_version": "2026.1", "top_p": 0.6,
        "torch_dtype": "float16", "dtype": "float32", "transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 8,
        "max_sequence_length": 7, "attn_implementation": "sdpa", "_flash_attn_2_enabled": True, "eos_token_id": [1, 2],
        "attention_dropout": 0.5, "pruned_heads": {}, "add_cross_attention": False,
    }  # fmt: skip
    assert metadata_of("llama3", **neutral) == metadata_of("llama3")
    assert not recwarn.list


@pytest.mark.parametrize("value", [False, "", [], {}])
def test_unknown_keys_that_ask_for_nothing_are_named(value):
    with pytest.warns(UserWarning, match="does not define, and that are not read: something_of_my_own"):
        metadata_of("llama3", something_of_my_own=value)


def test_a_family_reads_the_keys_that_it_lists(monkeypatch):
    keys = {
        "logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.5, "query_pre_attn_scalar": 4,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "no_rope_layers": [1, 0],
        "final_logit_softcapping": None, "muon": 3,
    }  # fmt: skip
    plain = metadata_of("llama3")
    family = replace(hf_config.FAMILIES["llama"], result_keys=tuple(keys)[:-1], unused_keys=("muon",))
    monkeypatch.setitem(hf_config.FAMILIES, "llama", family)
    read = {key: value for key, value in metadata_of("llama3", **keys).items() if key not in plain}
    assert read == {
        "llama.logit_scale": 8.0, "llama.embedding_scale": 12.0, "llama.attention.scale": 0.5,
        "llama.feed_forward.activation": "gelu_pytorch_tanh", "llama.rope.layers": [True, False],
    }  # fmt: skip
    for changes, message in [
        ({"query_pre_attn_scalar": 16}, "attention_multiplier and query_pre_attn_scalar that differ"),
        ({"hidden_activation": "silu"}, "hidden_act and hidden_activation that differ"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0: it is a number above 0"),
        ({"query_pre_attn_scalar": "4"}, "query_pre_attn_scalar '4'"),
        ({"no_rope_layers": [2]}, r"no_rope_layers \[2\]: it holds 0 or 1"),
    ]:
        with pytest.raises(HuggingFaceError, match=message):
            metadata_of("llama3", **{**keys, **changes})


def test_configs_of_transformers_hold_no_unknown_key(recwarn):
    for name in cases():
        metadata_of(name)
    assert not recwarn.list
