"""What a decoder is, in numbers: read once from a checkpoint's metadata, never changed."""

from __future__ import annotations

from dataclasses import dataclass

from .metadata import ConfigError
from .rope import RopeSpec


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder-only transformer with grouped-query attention.

    Attributes:
        architecture: GGUF's name of the family, e.g. ``llama``.
        name: what the checkpoint calls itself.
        generation: which published generation of its family has these numbers, empty if none is known to.
        num_layers, hidden_size, intermediate_size, vocab_size: sizes.
        num_heads, num_kv_heads: query heads, and the key/value heads they share.
        head_dim: elements of one head; need not be hidden_size / num_heads.
        context_length: tokens the model was trained for.
        rms_norm_eps: added to the mean square in every norm.
        softmax_scale: factor on q·k before the softmax.
        rope: the rotary embedding.
        sliding_windows: per layer, keys a query sees, itself included; 0 = all before it.
        tied_embeddings: the output projection is the token embedding.
        qkv_bias, output_bias, ffn_bias: which projections add a bias: those into attention, out of it, feed-forward.
        qk_norm: whether each query and key head is normed before rotation.
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
    generation: str = ""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads with {self.num_kv_heads} key/value heads",
                rule="every key/value head serves the same number of query heads",
                remedy="Check attention.head_count and attention.head_count_kv in the file",
            )
        if self.head_dim > 256 or self.head_dim % 8:
            raise ConfigError(
                f"head_dim {self.head_dim}",
                rule="the attention kernels take multiples of 8 up to 256",
                remedy="Check attention.key_length in the file",
            )
        if len(self.sliding_windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers",
                rule="every layer has one, 0 for none",
                remedy="Correct the adapter that built this config",
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_kind(self) -> str:
        """MHA (one key/value head a query head), MQA (one for all), or GQA (between)."""
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_bytes_per_token(self, itemsize: float) -> float:
        """Bytes that one token's keys and values take in all layers: 2 L Hkv D itemsize."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
