"""The Llama family: Llama 2, 3, 3.1, 3.2, and models of the same architecture (TinyLlama, Mistral, SmolLM2).

GGUF architecture ``llama``. Releases are told apart by the numbers in the file, never by its name:

    |                 | Llama 2         | Llama 3   | Llama 3.1          | Llama 3.2          |
    |-----------------|-----------------|-----------|--------------------|--------------------|
    | rope theta      | 1e4             | 5e5       | 5e5                | 5e5                |
    | rope scaling    | none            | none      | llama3, factor 8   | llama3, factor 32  |
    | key/value heads | MHA; 70B: GQA 8 | GQA 4, 8  | GQA 4, 8           | GQA 4, 3           |
    | vocabulary      | 32,000 SPM      | 128,256 byte BPE | same        | same               |
    | context         | 4,096           | 8,192     | 131,072            | 131,072            |
    | output          | own             | own       | own                | tied (1B, 3B)      |
"""

from __future__ import annotations

import warnings
from dataclasses import replace

from .config import ModelConfig
from .config_reader import read_decoder_config
from .hyperparameters import Hyperparameters
from .pre_norm import block, load_layer
from .weights import CheckpointReader

__all__ = ["block", "load_layer", "read_config"]


def read_config(reader: CheckpointReader) -> ModelConfig:
    keys = Hyperparameters(reader.checkpoint.metadata, "llama")
    if experts := keys.integer("expert_count", 0, minimum=0):
        found = f"llama.expert_count = {experts}"
        keys.refuse("expert_count", found, "mixtures of experts are not supported", "Use a dense model")
    keys.integer("expert_used_count", 0, minimum=0)
    config = read_decoder_config(
        reader,
        keys,
        softmax_scale=keys.real("attention.scale", None),
        harmless=("tensor_data_layout",),
    )
    if config.rope.rotary_dim != config.head_dim:
        keys.refuse(
            "rope.dimension_count",
            f"llama.rope.dimension_count {config.rope.rotary_dim} with head_dim {config.head_dim}",
            "architecture llama rotates whole heads",
            "The file is damaged, or of another architecture",
        )
    _flag_missing_scaling(config)
    return replace(config, release=_release(config))


def _release(config: ModelConfig) -> str:
    """The release in the table above that has these numbers; empty if none has."""
    rope = config.rope
    plain = rope.kind == "default" and rope.frequency_divisors is None
    numbers = (config.vocab_size, rope.base, config.context_length)
    if plain and numbers == (32_000, 1e4, 4096):
        return "Llama 2"
    if plain and numbers == (128_256, 5e5, 8192):
        return "Llama 3"
    if not plain and numbers == (128_256, 5e5, 131_072):
        return "Llama 3.2" if config.tied_embeddings else "Llama 3.1 or 3.3"
    return ""


def _flag_missing_scaling(config: ModelConfig) -> None:
    """Warn of Llama 3.1 and 3.2 files that were converted before July 2024, which lack rope_freqs."""
    rope = config.rope
    if rope.kind == "default" and rope.frequency_divisors is None and rope.base == 5e5 and config.context_length > 8192:
        warnings.warn(
            f"{config.name}: context {config.context_length} with theta 500000 is that of Llama 3.1 or later, whose "
            "RoPE scaling (rope_freqs.weight) this checkpoint lacks; text beyond 8192 tokens will degrade. "
            "Convert it again with a current converter",
            stacklevel=3,
        )
