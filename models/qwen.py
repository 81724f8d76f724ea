"""The Qwen family: Qwen 2, 2.5 and 3, dense.

GGUF architectures ``qwen2`` and ``qwen3``. The block is Llama's. The differences:

    |                 | Qwen 2, 2.5                     | Qwen 3                                          |
    |-----------------|---------------------------------|-------------------------------------------------|
    | q, k, v         | biases, always                  | none, but a norm on each query and key head     |
    | head_dim        | hidden_size / num_heads         | 128, whatever the hidden size                   |
    | rope theta      | 1e6                             | 1e6                                             |
    | long context    | YaRN, where the file asks for it| the same                                        |
    | sliding window  | off; if on, only from layer     | the same                                        |
    |                 | max_window_layers upwards       |                                                 |
    | group size      | 7, 6, 8, 5                      | 2, 4, 5, 8                                      |
    | output          | tied up to 3B                   | tied up to 4B                                   |
"""

from __future__ import annotations

from .config import ModelConfig
from .config_reader import read_decoder_config
from .hyperparameters import Hyperparameters
from .pre_norm import block, load_layer
from .weights import CheckpointReader

__all__ = ["block", "load_layer", "read_config"]


def read_config(reader: CheckpointReader) -> ModelConfig:
    keys = Hyperparameters(reader.checkpoint.metadata, reader.checkpoint.metadata["general.architecture"])
    if keys.has("attention.sliding_window") and not keys.has("attention.sliding_window_pattern"):
        keys.refuse(
            "attention.sliding_window",
            f"{keys.architecture}.attention.sliding_window without sliding_window_pattern",
            "Qwen's window holds from layer max_window_layers upwards, and the file does not say where that is",
            "Remove the key if the model's config has use_sliding_window false, or load its Hugging Face folder",
        )
    is_qwen2 = keys.architecture == "qwen2"
    return read_decoder_config(reader, keys, qk_norm=not is_qwen2, qkv_bias=True if is_qwen2 else None)
