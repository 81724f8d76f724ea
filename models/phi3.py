"""The Phi-3 family: Phi-3 mini and medium (4k and 128k), Phi-3.5 mini, Phi-4, Phi-4-mini.

GGUF architecture ``phi3``. The block is Llama's, with q, k, v in one tensor and gate, up in another. The releases:

    |                 | Phi-3 4k       | Phi-3 128k, 3.5        | Phi-4-mini              |
    |-----------------|----------------|------------------------|-------------------------|
    | rope scaling    | none           | longrope, 4096 first   | longrope, 4096 first    |
    | rotated         | all of a head  | all of a head          | 3/4 of a head           |
    | sliding window  | 2047           | as long as the context | as long as the context  |
    | key/value heads | mini: MHA with head_dim 96; medium: GQA 4  | GQA 3                   |
    | output          | own            | own                    | tied                    |

Every layer has the sliding window, as in transformers; llama.cpp ignores it. A window of 0 is none.
Files have no ``rope.scaling.type``: the tensors ``rope_factors_short`` and ``rope_factors_long`` mean longrope.
"""

from __future__ import annotations

from .config import ModelConfig
from .config_reader import read_decoder_config
from .hyperparameters import Hyperparameters
from .pre_norm import block, load_layer
from .weights import CheckpointReader

__all__ = ["block", "load_layer", "read_config"]


def read_config(reader: CheckpointReader) -> ModelConfig:
    return read_decoder_config(reader, Hyperparameters(reader.checkpoint.metadata, "phi3"))
