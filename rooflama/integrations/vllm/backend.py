"""The three classes of a vLLM attention backend: what it serves, what one batch is, and one layer's attention.

vLLM 0.33's cache of a layer is [num_blocks, num_kv_heads, block_size, 2 * head_size], K in front of V, in any order of
memory. K and V are views of it: pages [num_blocks, block_size, num_kv_heads, head_size]. vLLM calls
``do_kv_cache_update`` with the new keys, then ``forward``. The result is copied once, into vLLM's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from rooflama.kernels import attention_decode, attention_prefill, write_kv
from rooflama.models import ArgumentError


class RooflamaBackend(AttentionBackend):
    """Causal attention of decoders: sliding windows, soft caps, any group of query heads, head_size to 256."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RooflamaImpl]:
        return RooflamaImpl

    @staticmethod
    def get_builder_cls() -> type[RooflamaMetadataBuilder]:
        return RooflamaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 0 < head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8


@dataclass
class RooflamaMetadata:
    """One batch: the queries of all sequences, one after another."""

    num_tokens: int  # with vLLM's padding behind the last sequence
    max_query_len: int
    query_start_loc: Tensor  # int32 [num_seqs + 1]
    seq_lens: Tensor  # int32 [num_seqs]
    block_table: Tensor  # int32 [num_seqs, max_blocks]


class RooflamaMetadataBuilder(AttentionMetadataBuilder[RooflamaMetadata]):
    # A captured graph holds one of the two kernels. Both take other lengths when it is replayed.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RooflamaMetadata:
        batch = common_attn_metadata
        _refuse(batch.causal is not True, f"causal={batch.causal!r}")
        return RooflamaMetadata(
            num_tokens=batch.num_actual_tokens,
            max_query_len=batch.max_query_len,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table_tensor,
        )


class RooflamaImpl(AttentionImpl[RooflamaMetadata]):
    """The attention of one layer. Arguments that are not served must be None or 0."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unserved: Any,
    ) -> None:
        _refuse(attn_type != AttentionType.DECODER, f"attention of type {attn_type}")
        _refuse(kv_cache_dtype not in RooflamaBackend.supported_kv_cache_dtypes, f"kv_cache_dtype={kv_cache_dtype}")
        for name, value in {"alibi_slopes": alibi_slopes, **unserved}.items():
            _refuse(value is not None, f"{name} given to attention")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.options: dict[str, Any] = {
            "softmax_scale": scale,
            "sliding_window": sliding_window or 0,
            "softcap": logits_soft_cap or 0.0,
        }

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write key and value, [num_tokens, num_kv_heads, head_size], to their slots; a negative slot is padding."""
        num_tokens = slot_mapping.shape[0]
        write_kv(key[:num_tokens], value[:num_tokens], *self._pages(kv_cache), slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RooflamaMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention over the cache, which holds the new keys already.

        Args:
            query: [num_tokens, num_heads, head_size]; key and value are not read.
            attn_metadata: None while vLLM measures memory.
            output: [num_tokens, num_heads * head_size] or [num_tokens, num_heads, head_size]; written and returned.
                Padding behind the last sequence gets 0.
        """
        _refuse(output_scale is not None or output_block_scale is not None, "a quantised output")
        if attn_metadata is None:
            return output.fill_(0)
        batch = attn_metadata
        q = query[: batch.num_tokens].view(batch.num_tokens, self.num_heads, self.head_size)
        arguments = (q, *self._pages(kv_cache), batch.block_table, batch.seq_lens)
        if batch.max_query_len == 1 and batch.num_tokens == batch.seq_lens.shape[0]:
            out, _ = attention_decode(*arguments, **self.options)
        else:
            out, _ = attention_prefill(*arguments, batch.query_start_loc, **self.options)
        output[: batch.num_tokens].view(q.shape).copy_(out)
        return output

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, [num_blocks, block_size, num_kv_heads, head_size], in place."""
        shape = list(kv_cache.shape)
        if len(shape) != 4 or (shape[1], shape[3]) != (self.num_kv_heads, 2 * self.head_size):
            raise ArgumentError(
                f"a cache of shape {shape}",
                rule=f"a layer's cache is [num_blocks, {self.num_kv_heads}, block_size, 2 * {self.head_size}]",
                remedy="Use vLLM 0.33, for which this backend is written",
            )
        k_pages, v_pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_pages, v_pages


def _refuse(condition: bool, found: str) -> None:
    if condition:
        raise ArgumentError(
            found,
            rule="this backend serves causal attention of decoders over 16-bit or 32-bit caches",
            remedy="Leave out --attention-backend CUSTOM",
        )
