"""The one table of families: architecture -> adapter."""

from __future__ import annotations

from . import llama, phi3, qwen
from .decoder import Adapter
from .errors import ConfigError

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
