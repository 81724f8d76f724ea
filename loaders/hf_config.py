"""What a Hugging Face config.json says, under GGUF's keys; its tensors' names, as GGUF has them.

One key has no counterpart in GGUF: ``<architecture>.rope.huggingface`` carries the rotary parameters whole, since they
say more than GGUF's keys can. The models read them with ``RopeSpec.from_hf``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rooflama.kernels.errors import shorten

from .hf_json import HuggingFaceError

LAYER_TENSOR = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")  # one spelling for each layer
MOST_LAYERS = 100_000

TENSOR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' modules -> GGUF's tensors; those of a layer without ``model.layers.<i>.``."""

REQUIRED = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
OPTIONAL = {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
OTHERS_READ = ("model_type", "hidden_act", "tie_word_embeddings", "quantization_config", "attention_bias", "mlp_bias")
NO_EFFECT = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "initializer_range",
    "pad_token_id", "pretraining_tp", "resid_pdrop", "torch_dtype", "transformers_version", "use_cache",
    "auto_map", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type",
}  # fmt: skip
"""Keys that decide nothing about the logits."""


@dataclass(frozen=True)
class HFFamily:
    """How one ``model_type`` is read.

    Attributes:
        architecture: GGUF's name.
        required: keys without which transformers assumes the numbers of one particular model.
        biases: config keys that say whether projections have biases -> the tensor that shows it.
        window_keys: config keys that decide about sliding windows; any other is as unknown to this type.
        tensor_names: as ``TENSOR_NAMES``.
    """

    architecture: str
    required: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    window_keys: tuple[str, ...] = ()
    tensor_names: Mapping[str, str] = field(default_factory=lambda: TENSOR_NAMES)


QKV_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
QWEN_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

FAMILIES: dict[str, HFFamily] = {
    "llama": HFFamily("llama", biases={**QKV_BIAS, "mlp_bias": "blk.0.ffn_down.bias"}),
    "mistral": HFFamily(
        "llama", required=("num_key_value_heads", "sliding_window"), window_keys=("sliding_window", "layer_types")
    ),
    "qwen2": HFFamily("qwen2", required=("num_key_value_heads",), window_keys=QWEN_WINDOW),
    "qwen3": HFFamily("qwen3", required=("num_key_value_heads", "head_dim"), biases=QKV_BIAS, window_keys=QWEN_WINDOW),
    "phi3": HFFamily("phi3", required=("original_max_position_embeddings",), window_keys=("sliding_window",)),
}
"""Every ``model_type`` that is read. What is not here raises."""


def family_of(config: Mapping[str, Any]) -> HFFamily:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        _refuse(f"model_type {model_type!r}", f"the types are {', '.join(FAMILIES)}", "Use a model of these families")
    return FAMILIES[model_type]


def gguf_names(config: Mapping[str, Any], stored: Collection[str]) -> dict[str, str]:
    """Stored name -> GGUF's name, of every tensor that counts.

    Left out are ``rotary_emb.inv_freq``, which old checkpoints hold and the config decides, and a tied output, which is
    the embedding whatever the file holds.

    Raises:
        HuggingFaceError: a tensor that no model of this type has, two that are one in GGUF, or a missing output matrix.
    """
    family = family_of(config)
    tied = config.get("tie_word_embeddings", False)
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in stored:
        if name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        layer = LAYER_TENSOR.fullmatch(name)
        stem, _, kind = (layer[2] if layer else name).rpartition(".")
        if stem not in family.tensor_names or kind not in ("weight", "bias"):
            _refuse(
                f"tensor {name!r}",
                f"model_type {config['model_type']} has no such tensor, and nothing is dropped silently",
                "The checkpoint is of another type or variant, or quantised; report it",
            )
        canonical = f"{f'blk.{layer[1]}.' if layer else ''}{family.tensor_names[stem]}.{kind}"
        if (other := taken.setdefault(canonical, name)) != name:
            _refuse(
                f"tensors {min(name, other)!r} and {max(name, other)!r}",
                "a layer has one or the other",
                "The checkpoint is of another type or variant; report it",
            )
        names[name] = canonical
    if not tied and "lm_head.weight" not in stored:
        _refuse(
            "no lm_head.weight", "tie_word_embeddings is not true", "The checkpoint is incomplete: download it again"
        )
    return names


def gguf_metadata(config: Mapping[str, Any], tensors: Collection[str], *, name: str) -> dict[str, Any]:
    """The config under GGUF's keys.

    Args:
        config: the parsed config.json.
        tensors: GGUF's names of the tensors there are.
        name: what to call the model.

    Raises:
        HuggingFaceError: a key is missing, contradicts the tensors, or asks for what is not supported.
    """
    family = family_of(config)
    missing = [key for key in (*REQUIRED, *family.required) if key not in config]
    if missing:
        _refuse(
            f"no {', '.join(missing)}", "the model's shape depends on it", "Complete the file from the model's page"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        _refuse(f"hidden_act {config['hidden_act']!r}", "the feed-forward's gate is silu", "Use another model")
    if config.get("quantization_config") is not None:
        _refuse(
            "a quantization_config", "weights are F32, F16 or BF16", "Use the unquantised checkpoint, or a GGUF file"
        )
    for key, tensor in family.biases.items():
        if config.get(key, False) != (tensor in tensors):
            _refuse(
                f"{key} {config.get(key, False)}, and {tensor} is {'there' if tensor in tensors else 'not there'}",
                "a bias that the config names is in the files, and no other",
                "The config and the weights disagree; download both again",
            )
    _warn_of_unread(config, family)
    keys = {gguf: config[key] for key, gguf in {**REQUIRED, **OPTIONAL}.items() if config.get(key) is not None}
    keys["rope.huggingface"] = _rope(config)
    keys |= _windows(config, family)
    arch = family.architecture
    return {"general.architecture": arch, "general.name": name, **{f"{arch}.{key}": v for key, v in keys.items()}}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``RopeSpec.from_hf`` that the config gives."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        _refuse(
            "rope_scaling and rope_parameters that differ", "they name one rotation", "Remove the one that is wrong"
        )
    return {
        "rope_parameters": old or new,
        "theta": config.get("rope_theta"),
        "partial_rotary_factor": config.get("partial_rotary_factor"),
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }


def _windows(config: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """The sliding window, and where it holds in some layers only, in which."""
    said = {key: config.get(key) for key in family.window_keys}
    window, types = said.get("sliding_window"), said.get("layer_types")
    if not window or not said.get("use_sliding_window", True):
        return {}
    if types is None and "max_window_layers" not in said:
        return {"attention.sliding_window": window}
    if types is None:
        first, count = said["max_window_layers"], config["num_hidden_layers"]
        if first is None:
            _refuse(
                "use_sliding_window without max_window_layers or layer_types",
                "they say which layers slide",
                "Complete the file from the model's page",
            )
        if type(first) is not int or type(count) is not int or count > MOST_LAYERS:
            _refuse(
                f"max_window_layers {first!r} of num_hidden_layers {count!r}",
                f"both are whole numbers, of at most {MOST_LAYERS} layers",
                "Correct the file from the model's page",
            )
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    if not isinstance(types, list) or any(kind not in ("sliding_attention", "full_attention") for kind in types):
        _refuse(f"layer_types {types!r}", "layers attend fully or in a sliding window", "Use another model")
    slides = [kind == "sliding_attention" for kind in types]
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": slides}


def _warn_of_unread(config: Mapping[str, Any], family: HFFamily) -> None:
    """transformers ignores keys that its class for this type does not define; a model's own code may not."""
    known = {*REQUIRED, *OPTIONAL, *ROPE, *family.window_keys, *OTHERS_READ, *NO_EFFECT}
    unread = sorted(
        key for key, value in config.items() if value is not None and key not in known and not key.startswith("_")
    )
    if unread:
        warnings.warn(
            f"config.json has keys that model_type {config['model_type']} does not define, and that are not read: "
            f"{shorten(', '.join(unread))}",
            stacklevel=5,
        )


def _refuse(found: str, rule: str, remedy: str) -> NoReturn:
    raise HuggingFaceError(f"config.json: {found}", rule=rule, remedy=remedy)
