"""Translating a Hugging Face config.json to GGUF's keys, and its tensor names to GGUF's.

Three keys have no counterpart in GGUF. ``<architecture>.rope.huggingface`` holds all rotary parameters, because GGUF's
keys cannot express them; the models read it with ``rope_from_hf``. ``feed_forward.activation`` and ``rope.layers``
come from ``RESULT_KEYS``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..checkpoint import MOST_LAYERS
from .json_files import HuggingFaceError
from .rope import rope_arguments
from .unread import check_unread

LAYER_TENSOR = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")  # one spelling per layer
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
LEFTOVERS = re.compile(
    r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|(.+\.)?(position_ids|masked_bias|_extra_state)"
    r"|v_head\..+"
)
"""Tensors that change no logits: buffers of older releases, derived from the config, and a trainer's value head."""

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
"""transformers' modules -> GGUF's tensors. Modules of a layer are listed without ``model.layers.<i>.``."""

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
OTHERS_READ = ("model_type", "tie_word_embeddings", "transformers_weights", "quantization_config")

RESULT_KEYS = {
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "query_pre_attn_scalar": "attention.scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "clip_qkv": "attention.clamp_kqv",
    "hidden_act": "feed_forward.activation",
    "hidden_activation": "feed_forward.activation",
    "no_rope_layers": "rope.layers",
    "rope_local_base_freq": "rope.freq_base_swa",
}
"""Keys that change the logits -> the key under which an adapter reads them, if its family's ``result_keys`` list them.

Values are passed on unchanged, as GGUF's converters write them: Granite's ``logit_scale`` divides, Cohere's multiplies.
Two values are translated: ``query_pre_attn_scalar`` s becomes the scale s^-1/2, and ``no_rope_layers`` becomes one
boolean per layer, true if the layer rotates.
"""


@dataclass(frozen=True)
class HFFamily:
    """How folders of one ``model_type`` are read.

    Attributes:
        architecture: GGUF's name of the architecture.
        required: keys that must be present, because transformers' defaults are the numbers of one particular model.
        biases: config keys that say whether projections have biases -> a tensor that exists if they do.
        window_keys: config keys that decide about sliding windows; others are unknown to this type.
        result_keys: keys of ``RESULT_KEYS`` that the adapter reads. If a key is missing, null or not listed here, the
            adapter's default holds; a key whose default in transformers differs must also be in ``required``.
        unused_keys: further keys that change no result of this type, whatever their value.
        tied_by_default: the meaning of a missing ``tie_word_embeddings``.
        partial_rotary: whether ``partial_rotary_factor`` is used.
        tensor_names: as ``TENSOR_NAMES``.
        norm_offset: the number to add to each stored norm weight; Gemma stores weights minus 1.
    """

    architecture: str
    required: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    window_keys: tuple[str, ...] = ()
    result_keys: tuple[str, ...] = ()
    unused_keys: tuple[str, ...] = ()
    tied_by_default: bool = False
    partial_rotary: bool = False
    tensor_names: Mapping[str, str] = field(default_factory=lambda: TENSOR_NAMES)
    norm_offset: float = 0.0


QKV_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
QWEN_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

FAMILIES: dict[str, HFFamily] = {
    "llama": HFFamily("llama", biases={**QKV_BIAS, "mlp_bias": "blk.0.ffn_down.bias"}),
    "mistral": HFFamily(
        "llama", required=("num_key_value_heads", "sliding_window"), window_keys=("sliding_window", "layer_types")
    ),
    "qwen2": HFFamily("qwen2", required=("num_key_value_heads",), window_keys=QWEN_WINDOW),
    "qwen3": HFFamily("qwen3", required=("num_key_value_heads", "head_dim"), biases=QKV_BIAS, window_keys=QWEN_WINDOW),
    "phi3": HFFamily(
        "phi3",
        required=("original_max_position_embeddings",),
        window_keys=("sliding_window",),
        partial_rotary=True,
    ),
}
"""Every supported ``model_type``; any other is refused."""


def family_of(config: Mapping[str, Any]) -> HFFamily:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        _refuse(f"model_type {model_type!r}", f"the types are {', '.join(FAMILIES)}", "Use a model of these families")
    return FAMILIES[model_type]


def gguf_names(config: Mapping[str, Any], stored: Collection[str]) -> dict[str, str]:
    """Stored name -> GGUF's name, for every tensor but the ``LEFTOVERS``.

    Names may lack the prefix ``model.``, as in a base model saved without its head. If a tied model stores only
    ``lm_head.weight``, that is the embedding; if it stores both, both are named, and the caller compares them.

    Raises:
        HuggingFaceError: a model of this type has no such tensor, two tensors have one name in GGUF, or the output
            matrix is missing.
    """
    family = family_of(config)
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in stored:
        if LEFTOVERS.fullmatch(name):
            continue
        canonical = _gguf_name(family, name) or _gguf_name(family, f"model.{name}")
        if canonical is None:
            _refuse(
                f"tensor {name!r}",
                f"model_type {config['model_type']} has no such tensor, and nothing is dropped silently",
                "The checkpoint is of another type or variant, or quantised; report it",
            )
        if (other := taken.setdefault(canonical, name)) != name:
            _refuse(
                f"tensors {min(name, other)!r} and {max(name, other)!r}",
                "a layer has one or the other",
                "The checkpoint is of another type or variant; report it",
            )
        names[name] = canonical
    if OUTPUT not in taken and not is_tied(config):
        _refuse(
            "no lm_head.weight", "tie_word_embeddings is not true", "The checkpoint is incomplete: download it again"
        )
    if OUTPUT in taken and EMBEDDING not in taken and is_tied(config):
        names[taken[OUTPUT]] = EMBEDDING
    return names


def _gguf_name(family: HFFamily, name: str) -> str | None:
    layer = LAYER_TENSOR.fullmatch(name)
    stem, _, kind = (layer[2] if layer else name).rpartition(".")
    if stem not in family.tensor_names or kind not in ("weight", "bias"):
        return None
    return f"{f'blk.{layer[1]}.' if layer else ''}{family.tensor_names[stem]}.{kind}"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output matrix is the embedding, according to the config."""
    return bool(config.get("tie_word_embeddings", family_of(config).tied_by_default))


def gguf_metadata(config: Mapping[str, Any], tensors: Collection[str], *, name: str) -> dict[str, Any]:
    """The config under GGUF's keys.

    Args:
        config: the parsed config.json.
        tensors: GGUF's names of the stored tensors.
        name: the model's name.

    Raises:
        HuggingFaceError: a key is missing, contradicts the tensors, or asks for an unsupported computation.
    """
    family = family_of(config)
    missing = [key for key in (*REQUIRED, *family.required) if key not in config]
    if missing:
        _refuse(
            f"no {', '.join(missing)}", "the model's shape depends on it", "Complete the file from the model's page"
        )
    if config.get("quantization_config") is not None:
        _refuse(
            "a quantization_config", "weights are F32, F16 or BF16", "Use the unquantised checkpoint, or a GGUF file"
        )
    for key, tensor in family.biases.items():
        if bool(config.get(key)) != (tensor in tensors):
            _refuse(
                f"{key} {config.get(key, False)}, and {tensor} is {'there' if tensor in tensors else 'not there'}",
                "the files hold exactly the biases that the config names",
                "The config and the weights disagree; download both again",
            )
    windows = _windows(config, family)
    check_unread(config, _keys_read(family), windowed="attention.sliding_window" in windows)
    keys = {gguf: config[key] for key, gguf in {**REQUIRED, **OPTIONAL}.items() if config.get(key) is not None}
    keys["rope.huggingface"] = rope_arguments(config, partial_rotary=family.partial_rotary)
    keys |= windows | _result_keys(config, family)
    arch = family.architecture
    return {"general.architecture": arch, "general.name": name, **{f"{arch}.{key}": v for key, v in keys.items()}}


def _windows(config: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """The sliding window and, if only some layers have it, which ones."""
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


def _keys_read(family: HFFamily) -> set[str]:
    """Every key that is read for this type, or is known to change none of its results."""
    shape = {*REQUIRED, *OPTIONAL, *ROPE, *OTHERS_READ}
    return shape | {*family.biases, *family.window_keys, *family.result_keys, *family.unused_keys}


def _result_keys(config: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """The values of ``result_keys`` under the adapter's names. Two keys with one name must agree."""
    found: dict[str, Any] = {}
    for key in family.result_keys:
        value = config.get(key)
        if value is None:
            continue
        if key == "query_pre_attn_scalar":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                _refuse(f"{key} {value!r}", "it is a number above 0", "Correct the file from the model's page")
            value = value**-0.5
        if key == "no_rope_layers":
            if not isinstance(value, list) or any(entry not in (0, 1) for entry in value):
                _refuse(f"{key} {value!r}", "it holds 0 or 1 for each layer", "Correct the file from the model's page")
            value = [bool(entry) for entry in value]
        name = RESULT_KEYS[key]
        if found.setdefault(name, value) != value:
            both = [other for other in family.result_keys if RESULT_KEYS[other] == name]
            _refuse(f"{' and '.join(both)} that differ", "they must agree", "Remove the wrong one")
    return found


def _refuse(found: str, rule: str, remedy: str) -> NoReturn:
    raise HuggingFaceError(f"config.json: {found}", rule=rule, remedy=remedy)
