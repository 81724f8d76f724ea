"""The numbers that define a decoder, read from a checkpoint's metadata."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from rooflama.kernels.facts import Facts

from .errors import ConfigError
from .memory.amounts import size
from .rope.spec import RopeSpec

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class ModelConfig(Facts):
    """The numbers of a decoder-only transformer with grouped-query attention.

    Attributes:
        architecture: GGUF's name of the family, e.g. ``llama``.
        name: the checkpoint's own name.
        release: the published release of its family that has these numbers, such as ``Llama 3``; empty if unknown.
        num_layers, hidden_size, intermediate_size, vocab_size: sizes.
        num_heads, num_kv_heads: query heads, and the key/value heads that they share.
        head_dim: elements of one head; it may differ from hidden_size / num_heads.
        context_length: tokens that the model was trained for, or that its RoPE scaling reaches.
        rms_norm_eps: added to the mean square in every norm.
        softmax_scale: factor on q·k before the softmax.
        rope: the rotary embedding.
        sliding_windows: per layer, the number of keys that a query sees, its own included; 0 for all keys before it.
        tied_embeddings: whether the output projection is the token embedding.
        qkv_bias, output_bias, ffn_bias: whether the projections into attention, out of attention, and of the
            feed-forward add a bias.
        qk_norm: whether each query and key head is normed before rotation.
        post_norms: whether the outputs of attention and feed-forward are normed before they are added.
        activation: of the feed-forward's gate, one of ``ACTIVATIONS``.
        embedding_scale, residual_scale, logit_scale: factors on the embedding, on the outputs of attention and
            feed-forward, and on the logits.
        attention_softcap, logit_softcap: c of cap(x) = c tanh(x / c), on scores and on scaled logits; 0 is off.
        rope_interleaved: whether rotary pairs are (2j, 2j+1) in the stored rows and stay so, whatever the format.
        local_rope: the rotary embedding of layers with a sliding window; None if it is ``rope``.
        unrotated_layers: layers whose queries and keys are not rotated.
    """

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    softmax_scale: float
    rope: RopeSpec
    sliding_windows: tuple[int, ...]
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope_interleaved: bool = False
    local_rope: RopeSpec | None = None
    unrotated_layers: frozenset[int] = frozenset()
    release: str = ""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads with {self.num_kv_heads} key/value heads",
                rule="every key/value head serves the same number of query heads",
                remedy="Check attention.head_count and attention.head_count_kv in the file",
            )
        if self.head_dim > 256:
            raise ConfigError(
                f"head_dim {self.head_dim}",
                rule="the attention kernels take at most 256",
                remedy="Check attention.key_length in the file",
            )
        if len(self.sliding_windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers",
                rule="every layer has one; 0 is none",
                remedy="Correct the adapter that built this config",
            )
        self._check_hooks()

    def _check_hooks(self) -> None:
        """Raise ConfigError for numbers that the decoder cannot compute with."""
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {self.activation!r}",
                rule=f"the feed-forward's gate is one of {', '.join(ACTIVATIONS)}",
                remedy="Use another model, or add the activation to kernels/mlp.py",
            )
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            if not math.isfinite(value := getattr(self, name)) or value == 0:
                raise ConfigError(
                    f"{name} {value}", rule="a scale is finite and not 0", remedy="Check the file's number"
                )
        for name in ("attention_softcap", "logit_softcap"):
            if not math.isfinite(value := getattr(self, name)) or value < 0:
                raise ConfigError(
                    f"{name} {value}",
                    rule="a cap is finite and above 0, or 0 for none",
                    remedy="Check the file's number",
                )
        if outside := sorted(self.unrotated_layers - set(range(self.num_layers))):
            raise ConfigError(
                f"unrotated_layers {outside}",
                rule=f"layers are numbered 0 to {self.num_layers - 1}",
                remedy="Correct the adapter that built this config",
            )
        if self.local_rope is not None and self.local_rope.kind in ("longrope", "dynamic"):
            raise ConfigError(
                f"local_rope of kind {self.local_rope.kind!r}",
                rule="the rotation of layers with a sliding window must not depend on the sequence's length",
                remedy="Use another model",
            )

    def rope_of(self, layer: int) -> RopeSpec | None:
        """The rotary embedding of layer ``layer``; None if the layer does not rotate."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope is not None and self.sliding_windows[layer] else self.rope

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_kind(self) -> str:
        """MHA (one key/value head per query head), MQA (one for all), or GQA (in between)."""
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_bytes_per_token(self, itemsize: float) -> float:
        """Bytes of one token's keys and values in all layers: 2 L Hkv D itemsize."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def rows(self) -> list[tuple[str, str]]:
        """The facts, as (label, value)."""
        kinds = sorted(Counter(self.sliding_windows).items())
        windows = ", ".join(f"{window or 'none'} on {count} layers" for window, count in kinds)
        present = {"q, k, v": self.qkv_bias, "attention output": self.output_bias, "feed-forward": self.ffn_bias}
        biases = [name for name, there in present.items() if there]
        family = f"architecture {self.architecture}" + (f", {self.release}" if self.release else "")
        token_bytes = self.kv_bytes_per_token(2)
        return [
            ("model", f"{self.name} ({family})"),
            ("layers", f"{self.num_layers}, hidden {self.hidden_size}, feed-forward {self.intermediate_size}"),
            ("attention", f"{self.attention_kind}: {self.num_heads} query heads on {self.num_kv_heads} key/value heads "
                          f"(group {self.group_size}), head_dim {self.head_dim}"),
            ("QK norm", "yes" if self.qk_norm else "no"),
            *_beyond_llama(self),
            ("RoPE", _rope(self)),
            ("sliding window", windows if any(self.sliding_windows) else "none"),
            ("biases", ", ".join(biases) or "none"),
            ("context", f"{self.context_length:,} tokens"),
            ("K/V cache", f"{token_bytes:,.0f} bytes per token in 16 bits, "
                          f"{size(int(token_bytes * self.context_length))} at full context"),
            ("vocabulary", f"{self.vocab_size:,} tokens"),
            ("output", "tied to the token embedding" if self.tied_embeddings else "its own matrix"),
            ("norm eps", f"{self.rms_norm_eps:.3g}"),
        ]  # fmt: skip


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
