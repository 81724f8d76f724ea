"""What all families share: embedding, the loop over layers, attention over pages, the final norm and the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rooflama.kernels import (
    Weight,
    attention_decode,
    attention_prefill,
    embedding,
    quantized_matmul,
    rms_norm,
    rope,
    rope_and_cache_write,
    write_kv,
)

from .weights import CheckpointReader, Projection, TensorSource

if TYPE_CHECKING:
    from .config import ModelConfig
    from .kv_cache import PagedKVCache
    from .parallel import Ranks


class Observer(Protocol):
    """Is called with named intermediates of a prefill pass. They may be overwritten later: copy what you keep.

    "q", "k", "v" [num_tokens, heads, head_dim] are rotated, and keys and values are as stored: rounded to the pages'
    dtype, codes times their scale. "hidden" [num_tokens, hidden_size] is the residual stream after the layer.
    """

    def __call__(self, name: str, layer: int, tensor: Tensor, /) -> object: ...


LOGITS_ROWS = 8  # tokens per logits product of a whole prompt, whose float32 rows span the vocabulary


@dataclass(frozen=True)
class Step:
    """One forward pass over a ragged batch: its tokens, their positions, and the slots of their keys and values.

    Attributes:
        config, cache: the model's numbers, and the pages that the pass reads and writes.
        cos, sin: rotary tables, float32 [rows, rotary_dim / 2].
        local_rotation: cos, sin and rope_rows of layers with ``config.local_rope``; None if there are none.
        fused: whether norms, rotation and cache write run within larger kernels (``Decoder.fused``).
        observe: called with the intermediates of each layer; None for no observer.
        token_ids: int32 [num_tokens], the new tokens of all sequences, one sequence after the other.
        rope_rows: int32 [num_tokens], each token's row in the tables: its position, unless tables are stacked.
        slot_mapping: int64 [num_tokens], the slot of each token's key and value; negative to write neither.
        block_table: int32 [num_seqs, max_pages_per_seq].
        seq_lens: int32 [num_seqs], keys of each sequence, those of this step included.
        query_start_loc: int32 [num_seqs + 1], where each sequence's tokens start. None if each has exactly one, and
            ``attention_decode`` is to serve them: its sums have another order than those of ``attention_prefill``.
        arrivals: int32 [num_seqs, num_heads], zeros for ``attention_decode`` to count in. Passes that may run at the
            same time have one each. None for a pass that makes its own.
    """

    config: ModelConfig
    cache: PagedKVCache
    cos: Tensor
    sin: Tensor
    token_ids: Tensor
    rope_rows: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None = None
    local_rotation: tuple[Tensor, Tensor, Tensor] | None = None
    arrivals: Tensor | None = None
    fused: bool = True
    observe: Observer | None = None

    def attention(self, layer: int, *qkv: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> Tensor:
        """Rotate queries and keys, write keys and values to their pages, and attend, as ``config`` says of the layer.

        Args:
            layer: its index.
            qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], queries, then keys, then values. Several tensors
                are parts of it, side by side, each of whole queries, keys or values.
            q_norm, k_norm: [head_dim], weights of the norms before rotation (Qwen 3).

        Returns:
            [num_tokens, num_heads * head_dim].
        """
        config, cache = self.config, self.cache
        q, k, v = self._heads(qkv)
        k_pages, v_pages = cache.k_pages[layer], cache.v_pages[layer]
        scales: dict[str, Any] = {"k_scale": cache.k_scale[layer], "v_scale": cache.v_scale[layer]}
        rotated = layer not in config.unrotated_layers
        if rotated and self.fused:
            q = rope_and_cache_write(
                q, k, v, *self.rotation(layer), self.slot_mapping, k_pages, v_pages, q_norm, k_norm,
                eps=config.rms_norm_eps, interleaved=config.rope_interleaved, **scales,
            )  # fmt: skip
        else:
            q, k = self._normed(q, q_norm), self._normed(k, k_norm)
            if rotated:
                angles = self.rotation(layer)
                q, k = (rope(heads, *angles, interleaved=config.rope_interleaved) for heads in (q, k))
            write_kv(k, v, k_pages, v_pages, self.slot_mapping, **scales)
        if self.observe is not None:
            self.observe("q", layer, q)
            self.observe("k", layer, self._stored(k_pages, cache.k_scale[layer]))
            self.observe("v", layer, self._stored(v_pages, cache.v_scale[layer]))
        options: dict[str, Any] = {
            "softmax_scale": config.softmax_scale,
            "sliding_window": config.sliding_windows[layer],
            "softcap": config.attention_softcap,
            **scales,
        }
        if self.query_start_loc is None:
            options["arrivals"] = self.arrivals
            out, _ = attention_decode(q, k_pages, v_pages, self.block_table, self.seq_lens, **options)
        else:
            out, _ = attention_prefill(
                q, k_pages, v_pages, self.block_table, self.seq_lens, self.query_start_loc, **options
            )
        return out.flatten(1)

    def _heads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values [num_tokens, heads, head_dim]: views of the parts of ``qkv``."""
        left = [self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads]
        found: list[Tensor] = []
        for part in parts:
            heads = part.unflatten(-1, (-1, self.config.head_dim))
            inside: list[int] = []
            while sum(inside) < heads.shape[1]:
                inside.append(left.pop(0))
            found += heads.split(inside, dim=1)
        return found

    def rotation(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos, sin, and each token's row in them, for a layer that rotates."""
        if self.local_rotation is not None and self.config.rope_of(layer) is self.config.local_rope:
            return self.local_rotation
        return self.cos, self.sin, self.rope_rows

    def _stored(self, pages: Tensor, scale: Tensor | None) -> Tensor:
        """This step's keys or values as the pages hold them, [num_tokens, num_kv_heads, head_dim]."""
        stored = pages.flatten(0, 1)[self.slot_mapping]
        return stored if scale is None else stored.float() * scale.flatten(0, 1)[self.slot_mapping].unsqueeze(-1)

    def _normed(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        """[num_tokens, heads, head_dim] with each head normed; ``heads`` itself if there is no weight."""
        if weight is None:
            return heads
        return rms_norm(heads.flatten(0, 1), weight, self.config.rms_norm_eps).view(heads.shape)


class Adapter(Protocol):
    """A family: a module with these three functions. See docs/ADAPTER_PATTERN_GUIDE.md."""

    def read_config(self, reader: CheckpointReader) -> ModelConfig:
        """The config, from metadata and tensor shapes. Raises ConfigError for whatever it does not know."""

    def load_layer(self, source: TensorSource, config: ModelConfig, index: int) -> Any:
        """The weights of layer ``index`` on the device, in the family's own dataclass."""

    def block(self, layer: Any, hidden: Tensor, step: Step) -> Tensor:
        """One layer: the residual stream [num_tokens, hidden_size] in, the residual stream out."""


@dataclass(frozen=True)
class Decoder:
    """A model's weights on a device, or one rank's share of them, and its forward pass."""

    config: ModelConfig  # with the heads and the feed-forward width of this rank
    adapter: Adapter
    token_embedding: Weight  # [vocab_size, hidden_size], this rank's rows
    layers: list[Any]
    output_norm: Tensor  # [hidden_size]
    output: Weight  # [vocab_size, hidden_size], this rank's rows; the embedding itself where tied
    batch_invariant: bool  # whether its bits are: of products see quantized_matmul, of attention DecodeSlots
    fused: bool  # whether norms, activations and additions run within the products, see Projection
    ranks: Ranks | None = None  # those that share the model; None for one alone

    @classmethod
    def load(cls, source: TensorSource, config: ModelConfig, adapter: Adapter) -> Decoder:
        """Upload every tensor of the checkpoint. Raises ConfigError if one is missing, misshapen or unused."""
        token_embedding = source.vocabulary("token_embd.weight", config)
        layers = [adapter.load_layer(source, config, index) for index in range(config.num_layers)]
        output_norm = source.vector("output_norm.weight", config.hidden_size)
        output = token_embedding if config.tied_embeddings else source.vocabulary("output.weight", config)
        source.refuse_untaken()
        return cls(
            source.share.of(config),
            adapter,
            token_embedding,
            layers,
            output_norm,
            output,
            source.batch_invariant,
            source.fused,
            source.ranks,
        )

    def unfused(self) -> Decoder:
        """The same weights, run as after ``load(fused=False)``."""

        def plain(layer: Any) -> Any:
            projections = {name: part for name, part in vars(layer).items() if isinstance(part, Projection)}
            return replace(layer, **{name: projection.unfused() for name, projection in projections.items()})

        return replace(self, layers=[plain(layer) for layer in self.layers], fused=False)

    def hidden_states(self, step: Step, dtype: torch.dtype) -> Tensor:
        """The residual stream after the last layer, [num_tokens, hidden_size] in ``dtype``."""
        hidden = self._embedded(step.token_ids, dtype)
        if self.config.embedding_scale != 1:
            hidden *= self.config.embedding_scale
        for index, layer in enumerate(self.layers):
            hidden = self.adapter.block(layer, hidden, step)
            if step.observe is not None:
                step.observe("hidden", index, hidden)
        return hidden

    def _embedded(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """token_ids [num_tokens] -> [num_tokens, hidden_size]: one rank has a token's row, the others add zeros."""
        if self.ranks is None:
            return embedding(token_ids, self.token_embedding, dtype)
        rows = token_ids - self.ranks.share.part(self.config.vocab_size).start
        mine = (rows >= 0) & (rows < self.token_embedding.shape[0])
        found = embedding(torch.where(mine, rows, 0), self.token_embedding, dtype)
        return self.ranks.total(torch.where(mine.unsqueeze(1), found, 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_tokens, hidden_size] -> float32 [num_tokens, vocab_size]."""
        config, norm_weight = self.config, self.output_norm if self.fused else None
        if not self.fused:
            hidden = rms_norm(hidden, self.output_norm, config.rms_norm_eps)
        logits = quantized_matmul(
            hidden,
            self.output,
            norm_weight=norm_weight,
            eps=config.rms_norm_eps,
            batch_invariant=self.batch_invariant,
            resident=True,
            out_dtype=torch.float32,
        )
        if self.ranks is not None:
            logits = self.ranks.joined(logits, config.vocab_size)
        if config.logit_scale != 1:
            logits *= config.logit_scale
        if cap := config.logit_softcap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits
