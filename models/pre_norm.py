"""The block of Llama, Qwen and Phi-3: attention, then a gated feed-forward, each applied to the normed residual stream.

    h = x + Wo attention(rope(q), rope(k), v)           with q, k, v from norm(x)
    y = h + Wdown (act(Wgate n) * (Wup n))              with n = norm(h)

The config and the tensors say what varies: biases, a norm on each query and key head before the rotation (Qwen 3),
q, k and v in one tensor, gate and up in one tensor (Phi-3), the activation and a norm on both outputs (Gemma 2), a
factor on both outputs (Granite).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rooflama.kernels import rms_norm

from .config import ModelConfig
from .decoder import Step
from .weights import Projection, TensorSource


@dataclass(frozen=True)
class PreNormLayer:
    index: int
    attn_norm: Tensor  # [hidden_size]
    qkv: Projection  # [(num_heads + 2 num_kv_heads) * head_dim, hidden_size]; heads and width are this rank's
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    attn_output: Projection  # [hidden_size, num_heads * head_dim]
    attn_post_norm: Tensor | None  # [hidden_size]
    ffn_norm: Tensor  # [hidden_size]
    gate_up: Projection  # [2 intermediate_size, hidden_size]
    ffn_down: Projection  # [hidden_size, intermediate_size]
    ffn_post_norm: Tensor | None  # [hidden_size]


def block(layer: PreNormLayer, hidden: Tensor, step: Step) -> Tensor:
    """One layer: the residual stream [num_tokens, hidden_size] in, the residual stream out."""
    config = step.config
    eps = config.rms_norm_eps
    qkv = layer.qkv.apart(hidden, norm_weight=layer.attn_norm, eps=eps)
    attended = step.attention(layer.index, *qkv, q_norm=layer.q_norm, k_norm=layer.k_norm)
    hidden = add_projected(hidden, layer.attn_output, attended, config, layer.attn_post_norm)
    gated = layer.gate_up(hidden, norm_weight=layer.ffn_norm, eps=eps, gate=config.activation)
    return add_projected(hidden, layer.ffn_down, gated, config, layer.ffn_post_norm)


def add_projected(
    hidden: Tensor, projection: Projection, x: Tensor, config: ModelConfig, post_norm: Tensor | None
) -> Tensor:
    """hidden + residual_scale * norm(projection(x)), without the norm if ``post_norm`` is None."""
    if post_norm is None and config.residual_scale == 1:
        return projection(x, residual=hidden)
    added = projection(x)
    if post_norm is not None:
        added = rms_norm(added, post_norm, config.rms_norm_eps)
    return torch.add(hidden, added, alpha=config.residual_scale)


def load_layer(source: TensorSource, config: ModelConfig, index: int) -> PreNormLayer:
    """The weights of layer ``index``, on the device."""
    prefix = f"blk.{index}."
    hidden, head_dim, inner = config.hidden_size, config.head_dim, config.intermediate_size
    post_norm = {
        name: source.vector(f"{prefix}{name}.weight", hidden) if config.post_norms else None
        for name in ("post_attention_norm", "post_ffw_norm")
    }
    return PreNormLayer(
        index=index,
        attn_norm=source.vector(prefix + "attn_norm.weight", hidden),
        qkv=source.qkv(prefix, config),
        q_norm=source.vector(prefix + "attn_q_norm.weight", head_dim) if config.qk_norm else None,
        k_norm=source.vector(prefix + "attn_k_norm.weight", head_dim) if config.qk_norm else None,
        attn_output=source.output_projection(
            prefix, "attn_output", hidden, config.num_heads * head_dim, bias=config.output_bias
        ),
        attn_post_norm=post_norm["post_attention_norm"],
        ffn_norm=source.vector(prefix + "ffn_norm.weight", hidden),
        gate_up=source.gate_up(prefix, config),
        ffn_down=source.output_projection(prefix, "ffn_down", hidden, inner, bias=config.ffn_bias),
        ffn_post_norm=post_norm["post_ffw_norm"],
    )
