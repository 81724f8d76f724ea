"""A checkpoint's summary, read from its header."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rooflama.kernels.facts import Facts
from rooflama.loaders.opening import open_headers
from rooflama.models import CheckpointReader, ModelConfig
from rooflama.models.memory.amounts import size

from .planning import adapter_of, with_rope


@dataclass(frozen=True)
class Summary(Facts):
    """A checkpoint's configuration, and its tensors by type. Shows itself in a terminal and in Jupyter."""

    name: str
    config: ModelConfig
    tokenizer_model: str
    num_parameters: int
    tensor_bytes: dict[str, int]
    tensor_counts: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value)."""
        model, *numbers = self.config.rows()
        types = ", ".join(
            f"{kind} {count} ({size(self.tensor_bytes[kind])})" for kind, count in self.tensor_counts.items()
        )
        return [
            ("file", f"{self.name}, {size(sum(self.tensor_bytes.values()))} of tensors"),
            model,
            ("parameters", f"{self.num_parameters:,}"),
            *numbers,
            ("tokenizer", self.tokenizer_model),
            ("tensors", types),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values, for JSON."""
        return {
            "name": self.name,
            "parameters": self.num_parameters,
            "tokenizer": self.tokenizer_model,
            "tensors": {
                kind: {"count": count, "bytes": self.tensor_bytes[kind]} for kind, count in self.tensor_counts.items()
            },
            "config": asdict(self.config),
            "described": dict(self.rows()),
        }


def inspect(path: str | os.PathLike[str], *, rope: Mapping[str, Any] | str | None = None) -> Summary:
    """Summarise a checkpoint without loading its weights.

    Args:
        path: as for ``load``: a ``.gguf`` file, a Hugging Face folder, or a reference ``hf:owner/repo``.
        rope: another rotation than the file's, as for ``load``.

    Raises:
        UnknownCheckpointError, HubError, GGUFError, HuggingFaceError: it cannot be found or read.
        ConfigError: its architecture or a parameter is unknown.
    """
    with open_headers(path) as checkpoint:
        config = with_rope(adapter_of(checkpoint).read_config(CheckpointReader(checkpoint)), rope)
        sizes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        parameters = 0
        for info in checkpoint.tensors.values():
            sizes[info.ggml_type] += info.nbytes
            counts[info.ggml_type] += 1
            parameters += info.n_elements
        return Summary(checkpoint.name, config, checkpoint.tokenizer_kind, parameters, dict(sizes), dict(counts))
