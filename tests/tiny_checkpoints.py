"""Tiny random checkpoints of every family and edge case, as transformers modules, GGUF files and Hugging Face folders.

The oracle is transformers' modules, with random weights large enough that attention is far from uniform.
``gguf_metadata`` and ``gguf_tensors`` follow llama.cpp's converter: its keys, its names, its order of q and k rows for
architecture ``llama``, its divisors for Llama 3.1's scaling. ``MemoryCheckpoint`` has the same contents without a file,
for tests of config readers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rooflama.loaders.checkpoint import TensorInfo

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A config, and what the tests need to know about it.

    Attributes:
        config: makes the transformers config.
        lengths: sequence lengths to test; those at a boundary are both sides of it.
        in_gguf: whether GGUF can express the config.
        extra: metadata that a converter would not write but the reader takes.
        fused_qkv: whether the GGUF file holds q, k and v as one tensor where the module does not.
    """

    config: PreTrainedConfig
    lengths: tuple[int, ...] = (40,)
    in_gguf: bool = True
    extra: Mapping[str, Any] | None = None
    fused_qkv: bool = False


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes})


def _qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**SIZES, "rms_norm_eps": 1e-6, **changes})


def _qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**SIZES, "rms_norm_eps": 1e-6, "head_dim": 16, **changes})


def _phi3(**changes: Any) -> Phi3Config:
    return Phi3Config(**{**SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, **changes})


def _rope(kind: str, theta: float = 10_000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ORIGINAL = 32  # tokens: original context of every scaled case
LONGROPE = _rope(
    "longrope",
    short_factor=[1.0 + 0.05 * j for j in range(8)],
    long_factor=[1.0 + 1.5 * j for j in range(8)],
    original_max_position_embeddings=ORIGINAL,
)
WINDOW = 9  # tokens


@cache
def cases() -> dict[str, Case]:
    """Every family and edge case, by name."""
    around_original = (ORIGINAL, ORIGINAL + 1, 72)
    around_window = (WINDOW, WINDOW + 1, 72)
    partial = {**LONGROPE, "partial_rotary_factor": 0.75}
    partial |= {name: LONGROPE[name][:6] for name in ("short_factor", "long_factor")}
    table = {
        "llama2": Case(_llama(num_key_value_heads=6), lengths=(72,)),
        "llama2-13b-like-eps": Case(_llama(num_key_value_heads=6, rms_norm_eps=0.05)),
        "llama3": Case(_llama(rope_parameters=_rope("default", 5e5))),
        "llama3.1": Case(
            _llama(head_dim=32, rope_parameters=_rope("llama3", 5e5, factor=8.0, **LLAMA3_SCALING)),
            lengths=around_original,
        ),
        "llama3.2-tied": Case(
            _llama(
                tie_word_embeddings=True,
                head_dim=32,
                rope_parameters=_rope("llama3", 5e5, factor=32.0, **LLAMA3_SCALING),
            )
        ),
        "llama-mqa": Case(_llama(num_key_value_heads=1)),
        "llama-group5": Case(_llama(hidden_size=80, num_attention_heads=10)),
        "llama-group7": Case(_llama(num_attention_heads=7, num_key_value_heads=1, head_dim=24, hidden_size=56)),
        "llama-key-length": Case(_llama(head_dim=40)),
        "llama-head-dim-100": Case(_llama(head_dim=100)),
        "llama-head-dim-10": Case(_llama(head_dim=10, num_key_value_heads=6)),
        "llama-biases": Case(_llama(attention_bias=True, mlp_bias=True)),
        "llama-fused-qkv": Case(_llama(), fused_qkv=True),
        "llama-fused-qkv-biases": Case(_llama(attention_bias=True), fused_qkv=True),
        "llama-linear": Case(_llama(rope_parameters=_rope("linear", factor=4.0))),
        "llama-dynamic": Case(_llama(rope_parameters=_rope("dynamic", factor=4.0)), in_gguf=False),
        "llama-yarn": Case(_llama(rope_parameters=_rope("yarn", **YARN)), lengths=around_original),
        "llama-yarn-attention-factor": Case(
            _llama(rope_parameters=_rope("yarn", attention_factor=1.3, beta_fast=16.0, **YARN)), in_gguf=False
        ),
        "mistral-window": Case(
            MistralConfig(**SIZES, sliding_window=WINDOW),
            lengths=around_window,
            extra={"llama.attention.sliding_window": WINDOW},
        ),
        "mistral-no-window": Case(MistralConfig(**SIZES, sliding_window=None)),
        "qwen2": Case(_qwen2(rope_parameters=_rope("default", 1e6)), lengths=(72,)),
        "qwen2-tied-group7": Case(
            _qwen2(tie_word_embeddings=True, num_attention_heads=7, num_key_value_heads=1, hidden_size=56)
        ),
        "qwen2-fused-qkv": Case(_qwen2(), fused_qkv=True),
        "qwen2-yarn": Case(_qwen2(rope_parameters=_rope("yarn", 1e6, **YARN)), lengths=around_original),
        "qwen2-window": Case(
            _qwen2(num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
            lengths=around_window,
            extra={
                "qwen2.attention.sliding_window": WINDOW,
                "qwen2.attention.sliding_window_pattern": [False, True, True],
            },
        ),
        "qwen3": Case(_qwen3(rope_parameters=_rope("default", 1e6)), lengths=(72,)),
        "qwen3-tied": Case(_qwen3(tie_word_embeddings=True)),
        "qwen3-yarn": Case(_qwen3(rope_parameters=_rope("yarn", 1e6, **YARN)), lengths=around_original),
        "qwen3-bias": Case(_qwen3(attention_bias=True)),
        "phi3-4k": Case(_phi3(sliding_window=WINDOW), lengths=around_window),
        "phi3-medium": Case(_phi3(num_key_value_heads=1, sliding_window=None)),
        "phi3-128k": Case(
            _phi3(original_max_position_embeddings=ORIGINAL, rope_parameters=LONGROPE, sliding_window=256),
            lengths=around_original,
        ),
        "phi4-mini": Case(
            _phi3(
                original_max_position_embeddings=ORIGINAL,
                rope_parameters=partial,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            lengths=around_original,
        ),
        "phi3-partial-rotary": Case(_phi3(rope_parameters=_rope("default", partial_rotary_factor=0.75))),
    }
    return table


@cache
def module(name: str) -> PreTrainedModel:
    """Case ``name`` as a transformers module in float32 with random weights."""
    return make_module(cases()[name].config)


def make_module(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    config._attn_implementation = "eager"
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in parameter_name:
                parameter.copy_(noise)
            else:
                gain = 1.5 if any(part in parameter_name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter.shape[1]))
    made.tie_weights()
    return made


def reference_logits(made: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits, float32 [num_tokens, vocab_size]."""
    with torch.no_grad():
        return made(torch.tensor([token_ids])).logits[0].float()


def random_tokens(length: int, vocab_size: int = SIZES["vocab_size"], seed: int = 1) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()


# GGUF, as the converter writes it.

GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}

_LAYER_NAMES = {
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
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """transformers' name of a tensor -> GGUF's."""
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    _, _, index, inner = stem.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[inner]}.{kind}"


def interleave_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """The converter's order of q and k rows: half-split pairs to interleaved ones."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def split_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of ``interleave_rows``."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def head_dim_of(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_tensors(made: PreTrainedModel, *, fused_qkv: bool = False) -> dict[str, np.ndarray]:
    """The module's weights under GGUF's names, float32, in the converter's order of rows."""
    config = made.config
    tensors = {}
    for name, parameter in made.named_parameters():  # a tied output is not among them
        values = parameter.detach().numpy().copy()
        if GGUF_ARCHITECTURES[config.model_type] == "llama":
            if ".q_proj." in name:
                values = interleave_rows(values, config.num_attention_heads)
            if ".k_proj." in name:
                values = interleave_rows(values, config.num_key_value_heads)
        tensors[gguf_name(name)] = values
    if fused_qkv:
        for index in range(config.num_hidden_layers):
            for kind in ("weight", "bias"):
                names = [f"blk.{index}.attn_{part}.{kind}" for part in "qkv"]
                if names[0] in tensors:
                    tensors[f"blk.{index}.attn_qkv.{kind}"] = np.concatenate([tensors.pop(n) for n in names])
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        exponents = np.arange(0, head_dim_of(config), 2) / head_dim_of(config)
        scaled = made.model.rotary_emb.inv_freq.double().numpy()
        tensors["rope_freqs.weight"] = (rope["rope_theta"] ** -exponents / scaled).astype(np.float32)
    if rope["rope_type"] == "longrope":
        for length in ("short", "long"):
            tensors[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], dtype=np.float32)
    return tensors


def gguf_metadata(config: PreTrainedConfig) -> dict[str, Any]:
    """The config under GGUF's keys."""
    arch = GGUF_ARCHITECTURES[config.model_type]
    head_dim = head_dim_of(config)
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch == "llama":
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if arch == "phi3":
        original = config.original_max_position_embeddings
        keys["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        keys["rope.scaling.original_context_length"] = original
        keys["attention.sliding_window"] = config.sliding_window or 0
        if rope["rope_type"] == "longrope":
            factor = config.max_position_embeddings / original
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {"general.architecture": arch, "general.name": "tiny", **{f"{arch}.{key}": v for key, v in keys.items()}}


@dataclass(frozen=True)
class Blocks:
    """A quantised tensor: raw bytes [rows, bytes_per_row] of a ggml type."""

    raw: np.ndarray
    ggml_type: str


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Blocks]) -> Path:
    """A GGUF file, by gguf's own writer."""
    writer = GGUFWriter(str(path), metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in tensors.items():
        if isinstance(values, Blocks):
            writer.add_tensor(name, values.raw, raw_dtype=gguf.GGMLQuantizationType[values.ggml_type])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_case(name: str, folder: Path, source: str) -> Path:
    """Case ``name`` as a GGUF file (source "gguf") or as a Hugging Face folder ("safetensors") inside ``folder``."""
    case, made = cases()[name], module(name)
    if source == "safetensors":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_pretrained(folder / name)
        return folder / name
    metadata = gguf_metadata(case.config) | dict(case.extra or {})
    return write_gguf(folder / f"{name}.gguf", metadata, gguf_tensors(made, fused_qkv=case.fused_qkv))


class MemoryCheckpoint:
    """A Checkpoint without a file: GGUF's metadata and float32 tensors."""

    def __init__(self, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self.metadata, self.arrays = dict(metadata), dict(arrays)
        self.tensors = {
            name: TensorInfo(name, "F32", array.shape, array.nbytes, 0, 0) for name, array in arrays.items()
        }
        self.interleaved_rope_rows = metadata["general.architecture"] == "llama"
        self.norm_offset = 0.0

    def data(self, name: str) -> np.ndarray:
        array = np.ascontiguousarray(self.arrays[name], dtype=np.float32)
        return array.reshape(-1 if array.ndim > 1 else 1, array.shape[-1]).view(np.uint8)

    def close(self) -> None:
        pass
