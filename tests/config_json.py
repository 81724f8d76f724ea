"""The config.json of a tiny checkpoint with changes, and the metadata that the loader reads from it."""

import json
from typing import Any

from rooflama.loaders.huggingface.config import gguf_metadata, gguf_names
from tiny_checkpoints import cases, module

DROPPED = object()
"""The value of a key that a config shall not have."""


def config_json(name: str, **changes: Any) -> dict[str, Any]:
    """Case ``name``'s config.json as transformers writes it, with keys changed."""
    config = json.loads(json.dumps(cases()[name].config.to_dict(), default=str)) | changes
    return {key: value for key, value in config.items() if value is not DROPPED}


def tensor_names(name: str) -> list[str]:
    return [stored for stored, _ in module(name).named_parameters()]


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    """The metadata that the loader reads from ``config_json``."""
    config = config_json(name, **changes)
    return gguf_metadata(config, gguf_names(config, tensor_names(name)).values(), name=name)
