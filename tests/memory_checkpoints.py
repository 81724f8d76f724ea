"""The tiny checkpoints as a GGUF file has them, in memory, with keys and tensors changed."""

from rooflama.models import CheckpointReader, ModelConfig, adapter_for
from tiny_checkpoints import MemoryCheckpoint, cases, gguf_metadata, gguf_tensors, module


def checkpoint(name: str, changes=(), tensors=(), *, without=()) -> MemoryCheckpoint:
    """Case ``name`` in memory, with keys of its architecture and tensors changed, or left out."""
    made = module(name)
    metadata = gguf_metadata(made.config) | dict(cases()[name].extra or {})
    arch = metadata["general.architecture"]
    metadata |= {f"{arch}.{key}": value for key, value in dict(changes).items()}
    arrays = gguf_tensors(made, fused_qkv=cases()[name].fused_qkv) | dict(tensors)
    dropped = {*without, *(f"{arch}.{key}" for key in without)}
    return MemoryCheckpoint(
        {key: value for key, value in metadata.items() if key not in dropped},
        {key: value for key, value in arrays.items() if key not in dropped},
    )


def config_of(stored: MemoryCheckpoint) -> ModelConfig:
    return adapter_for(stored.metadata["general.architecture"]).read_config(CheckpointReader(stored))
