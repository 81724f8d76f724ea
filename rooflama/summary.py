"""A checkpoint's summary, read from its header."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from rooflama.loaders.opening import open_headers
from rooflama.models import CheckpointReader, ModelConfig
from rooflama.models.facts import fact_html, fact_table
from rooflama.models.memory.amounts import size

from .planning import adapter_of, with_rope


@dataclass(frozen=True)
class Summary:
    """A checkpoint's configuration, and its tensors by type. Shows itself in a terminal and in Jupyter."""

    name: str
    config: ModelConfig
    tokenizer_model: str
    num_parameters: int
    tensor_bytes: dict[str, int]
    tensor_counts: dict[str, int]

    def rows(self) -> list[tuple[str, str]]:
        """The facts as (label, value)."""
        c = self.config
        windows = sorted(set(c.sliding_windows))
        window = (
            "none"
            if windows == [0]
            else ", ".join(f"{w or 'none'} on {n} layers" for w, n in sorted(Counter(c.sliding_windows).items()))
        )
        present = {"q, k, v": c.qkv_bias, "attention output": c.output_bias, "feed-forward": c.ffn_bias}
        biases = [name for name, there in present.items() if there]
        family = f"architecture {c.architecture}" + (f", {c.release}" if c.release else "")
        types = ", ".join(
            f"{kind} {count} ({size(self.tensor_bytes[kind])})" for kind, count in self.tensor_counts.items()
        )
        return [
            ("file", f"{self.name}, {size(sum(self.tensor_bytes.values()))} of tensors"),
            ("model", f"{c.name} ({family})"),
            ("parameters", f"{self.num_parameters:,}"),
            ("layers", f"{c.num_layers}, hidden {c.hidden_size}, feed-forward {c.intermediate_size}"),
            ("attention", f"{c.attention_kind}: {c.num_heads} query heads on {c.num_kv_heads} key/value heads "
                          f"(group {c.group_size}), head_dim {c.head_dim}"),
            ("QK norm", "yes" if c.qk_norm else "no"),
            *_beyond_llama(c),
            ("RoPE", _rope(c)),
            ("sliding window", window),
            ("biases", ", ".join(biases) or "none"),
            ("context", f"{c.context_length:,} tokens"),
            ("K/V cache", f"{c.kv_bytes_per_token(2):,.0f} bytes per token in 16 bits, "
                          f"{size(int(c.kv_bytes_per_token(2) * c.context_length))} at full context"),
            ("vocabulary", f"{c.vocab_size:,} tokens, {self.tokenizer_model}"),
            ("output", "tied to the token embedding" if c.tied_embeddings else "its own matrix"),
            ("norm eps", f"{c.rms_norm_eps:.3g}"),
            ("tensors", types),
        ]  # fmt: skip

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fact_table(self.rows())

    def _repr_html_(self) -> str:
        return fact_html(self.rows())


def _rope(config: ModelConfig) -> str:
    """The rotation, and the layers that have another one or none."""
    local = [] if config.local_rope is None else [f"with a sliding window {config.local_rope.describe()}"]
    none = [f"none on {len(config.unrotated_layers)} of {config.num_layers} layers"] if config.unrotated_layers else []
    pairs = ["pairs (2j, 2j+1)"] if config.rope_interleaved else []
    return "; ".join([config.rope.describe(), *pairs, *local, *none])


def _beyond_llama(config: ModelConfig) -> list[tuple[str, str]]:
    """Facts of families with more parts than Llama; none for Llama."""
    factors = {
        "embedding": config.embedding_scale,
        "residual": config.residual_scale,
        "logits": config.logit_scale,
        "q·k": config.softmax_scale * config.head_dim**0.5,
    }
    factors = {name: value for name, value in factors.items() if abs(value - 1) > 1e-6}
    if "q·k" in factors:
        factors["q·k"] = config.softmax_scale
    caps = {"attention": config.attention_softcap, "logits": config.logit_softcap}
    rows = [
        ("factors", ", ".join(f"{name} {value:.4g}" for name, value in factors.items())),
        ("soft caps", ", ".join(f"{name} {value:g}" for name, value in caps.items() if value)),
        ("activation", "" if config.activation == "silu" else config.activation),
        ("post norms", "yes" if config.post_norms else ""),
    ]
    return [(label, value) for label, value in rows if value]


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
