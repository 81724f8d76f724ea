"""What a family must say of itself, and the one table of families."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import llama, phi3, qwen
from .config import ModelConfig
from .decoder import Step
from .hyperparameters import ConfigError
from .weights import CheckpointReader, TensorSource


class Adapter(Protocol):
    """A family's page. A module with these three functions is an adapter; see docs/ADAPTER_PATTERN_GUIDE.md."""

    def read_config(self, reader: CheckpointReader) -> ModelConfig:
        """The numbers, from metadata and tensor shapes alone. Raises ConfigError on anything it does not know."""

    def load_layer(self, source: TensorSource, config: ModelConfig, index: int) -> Any:
        """Layer ``index``'s weights, on the device, in the family's own dataclass."""

    def block(self, layer: Any, hidden: Tensor, step: Step) -> Tensor:
        """One layer: the residual stream [num_tokens, hidden_size] in, the residual stream out."""


ADAPTERS: dict[str, Adapter] = {
    "llama": llama,
    "phi3": phi3,
    "qwen2": qwen,
    "qwen3": qwen,
}


def adapter_for(architecture: str) -> Adapter:
    """The adapter of GGUF's ``general.architecture``. Raises ConfigError if there is none."""
    if architecture not in ADAPTERS:
        raise ConfigError(
            f"architecture {architecture!r}",
            rule=f"rooflama has adapters for {', '.join(sorted(ADAPTERS))}",
            remedy="Use a model of these families, or add an adapter (docs/ADAPTER_PATTERN_GUIDE.md)",
        )
    return ADAPTERS[architecture]
