"""The block of Llama, Qwen and Phi-3: attention, then a gated feed-forward, each on the norm of what it adds to.

    h = x + Wo attention(rope(q), rope(k), v)           with q, k, v from norm(x)
    y = h + Wdown (silu(Wgate n) * (Wup n))             with n = norm(h)

What varies is in the config or in the tensors: biases, a norm on each query and key head before the rotation (Qwen 3),
q, k and v in one tensor, gate and up in one tensor (Phi-3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import ModelConfig
from .decoder import Step
from .weights import Projection, TensorSource


@dataclass(frozen=True)
class PreNormLayer:
    index: int
    attn_norm: Tensor  # [hidden_size]
    qkv: Projection  # [(num_heads + 2 num_kv_heads) * head_dim, hidden_size]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    attn_output: Projection  # [hidden_size, num_heads * head_dim]
    ffn_norm: Tensor  # [hidden_size]
    gate_up: Projection  # [2 intermediate_size, hidden_size]
    ffn_down: Projection  # [hidden_size, intermediate_size]


def block(layer: PreNormLayer, hidden: Tensor, step: Step) -> Tensor:
    """One layer: the residual stream [num_tokens, hidden_size] in, the residual stream out."""
    eps = step.config.rms_norm_eps
    qkv = layer.qkv(hidden, norm_weight=layer.attn_norm, eps=eps)
    attended = step.attention(layer.index, qkv, q_norm=layer.q_norm, k_norm=layer.k_norm)
    hidden = layer.attn_output(attended, residual=hidden)
    gated = layer.gate_up(hidden, norm_weight=layer.ffn_norm, eps=eps, swiglu=True)
    return layer.ffn_down(gated, residual=hidden)


def load_layer(source: TensorSource, config: ModelConfig, index: int) -> PreNormLayer:
    """Layer ``index``'s weights, on the device."""
    prefix = f"blk.{index}."
    hidden, head_dim, inner = config.hidden_size, config.head_dim, config.intermediate_size
    return PreNormLayer(
        index=index,
        attn_norm=source.vector(prefix + "attn_norm.weight", hidden),
        qkv=source.qkv(prefix, config),
        q_norm=source.vector(prefix + "attn_q_norm.weight", head_dim) if config.qk_norm else None,
        k_norm=source.vector(prefix + "attn_k_norm.weight", head_dim) if config.qk_norm else None,
        attn_output=source.projection(
            prefix, {"attn_output": hidden}, config.num_heads * head_dim, bias=config.output_bias
        ),
        ffn_norm=source.vector(prefix + "ffn_norm.weight", hidden),
        gate_up=source.gate_up(prefix, config),
        ffn_down=source.projection(prefix, {"ffn_down": hidden}, inner, bias=config.ffn_bias),
    )
