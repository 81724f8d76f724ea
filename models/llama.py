"""The Llama family: Llama 2, 3, 3.1, 3.2, and what shares its architecture (TinyLlama, Mistral, SmolLM2).

GGUF architecture ``llama``. What tells the generations apart is in the file, never in the name:

    |                 | Llama 2         | Llama 3   | Llama 3.1          | Llama 3.2          |
    |-----------------|-----------------|-----------|--------------------|--------------------|
    | rope theta      | 1e4             | 5e5       | 5e5                | 5e5                |
    | rope scaling    | none            | none      | llama3, factor 8   | llama3, factor 32  |
    | key/value heads | MHA; 70B: GQA 8 | GQA 4, 8  | GQA 4, 8           | GQA 4, 3           |
    | vocabulary      | 32,000 SPM      | 128,256 byte BPE | same        | same               |
    | context         | 4,096           | 8,192     | 131,072            | 131,072            |
    | output          | own             | own       | own                | tied (1B, 3B)      |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rooflama.kernels import rms_norm, swiglu

from .config import ModelConfig
from .decoder import Step
from .metadata import ConfigError, Hyperparameters
from .rope_metadata import read_rope
from .weights import CheckpointReader, Projection, TensorSource, unpair_rows


@dataclass(frozen=True)
class LlamaLayer:
    index: int
    attn_norm: Tensor  # [hidden_size]
    qkv: Projection  # [(num_heads + 2 num_kv_heads) * head_dim, hidden_size]
    attn_output: Projection  # [hidden_size, num_heads * head_dim]
    ffn_norm: Tensor  # [hidden_size]
    gate_up: Projection  # [2 intermediate_size, hidden_size]
    ffn_down: Projection  # [hidden_size, intermediate_size]


def block(layer: LlamaLayer, hidden: Tensor, step: Step) -> Tensor:
    """h = x + Wo attention(rope(q), rope(k), v);  y = h + Wdown (silu(Wgate n) * Wup n) with n = norm(h)."""
    eps = step.config.rms_norm_eps
    qkv = layer.qkv(rms_norm(hidden, layer.attn_norm, eps))
    attended = step.attention(layer.index, qkv)
    hidden = layer.attn_output(attended, residual=hidden)
    gate, up = layer.gate_up(rms_norm(hidden, layer.ffn_norm, eps)).chunk(2, dim=-1)
    return layer.ffn_down(swiglu(gate, up), residual=hidden)


def load_layer(source: TensorSource, config: ModelConfig, index: int) -> LlamaLayer:
    prefix = f"blk.{index}."
    hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    row_order = None
    if source.checkpoint.interleaved_rope_rows:
        row_order = {
            "attn_q": unpair_rows(heads, head_dim, config.rope.rotary_dim),
            "attn_k": unpair_rows(kv_heads, head_dim, config.rope.rotary_dim),
        }
    qkv_rows = {"attn_q": heads * head_dim, "attn_k": kv_heads * head_dim, "attn_v": kv_heads * head_dim}
    gate_up_rows = dict.fromkeys(("ffn_gate", "ffn_up"), config.intermediate_size)
    return LlamaLayer(
        index=index,
        attn_norm=source.vector(prefix + "attn_norm.weight", hidden),
        qkv=source.projection(prefix, qkv_rows, hidden, row_order=row_order),
        attn_output=source.projection(prefix, {"attn_output": hidden}, heads * head_dim),
        ffn_norm=source.vector(prefix + "ffn_norm.weight", hidden),
        gate_up=source.projection(prefix, gate_up_rows, hidden),
        ffn_down=source.projection(prefix, {"ffn_down": hidden}, config.intermediate_size),
    )


def read_config(reader: CheckpointReader) -> ModelConfig:
    keys = Hyperparameters(reader.checkpoint.metadata, "llama")
    tensors = reader.checkpoint.tensors
    if keys.integer("expert_count", 0, minimum=0):
        raise ConfigError(
            f"llama.expert_count = {reader.checkpoint.metadata['llama.expert_count']}",
            rule="mixtures of experts are not supported",
            remedy="Use a dense model",
        )
    keys.integer("expert_used_count", 0, minimum=0)
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"key_length {head_dim} and another value_length",
            rule="keys and values have one head_dim",
            remedy="Use a model where they agree",
        )
    context_length = keys.integer("context_length")
    divisors = None
    if "rope_freqs.weight" in tensors:
        num_pairs = keys.integer("rope.dimension_count", head_dim) // 2
        divisors = tuple(reader.host_vector("rope_freqs.weight", num_pairs).tolist())
    config = ModelConfig(
        architecture="llama",
        name=reader.checkpoint.metadata.get("general.name", "unnamed"),
        num_layers=(num_layers := keys.integer("block_count")),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=reader.vocab_size(keys),
        context_length=context_length,
        rms_norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        softmax_scale=keys.real("attention.scale", head_dim**-0.5),
        rope=read_rope(keys, head_dim=head_dim, context_length=context_length, divisors=divisors),
        sliding_windows=(keys.integer("attention.sliding_window", 0, minimum=0),) * num_layers,
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )
    keys.refuse_unread(harmless=("rope.scaling.finetuned", "tensor_data_layout"))
    return config
