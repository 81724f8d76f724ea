"""Configs of well-known models, and the types that llama.cpp gives their tensors."""

from rooflama.models import ModelConfig, RopeSpec
from rooflama.testing.model_shapes import SHAPES

FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that are no whole number of blocks


def config_of(name: str, **changes) -> ModelConfig:
    layers, hidden, heads, kv_heads, head_dim, width, vocabulary, tied, biases, qk_norm = SHAPES[name]
    values = {
        "architecture": "llama",
        "name": name,
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "context_length": 131072,
        "rms_norm_eps": 1e-5,
        "softmax_scale": head_dim**-0.5,
        "rope": RopeSpec(head_dim=head_dim, rotary_dim=head_dim),
        "sliding_windows": (0,) * layers,
        "tied_embeddings": tied,
        "qkv_bias": biases,
        "qk_norm": qk_norm,
    }
    return ModelConfig(**{**values, **changes})


def type_rule(name: str, mix: str):
    """Which type llama.cpp's quantiser gives each tensor of a model."""
    config = config_of(name)
    layers, tied = config.num_layers, config.tied_embeddings

    def wanted(tensor: str) -> str:
        if mix in ("F16", "Q8_0"):
            return mix
        if tensor == ("token_embd.weight" if tied else "output.weight"):
            return "Q6_K"
        if mix == "Q4_0":
            return mix
        if name.startswith("Phi-3") and any(part in tensor for part in ("attn_q", "attn_k", "attn_v")):
            return "Q5_K"  # fused in the file
        if "attn_v" in tensor or "ffn_down" in tensor:
            i = int(tensor.split(".")[1])
            if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2:
                return "Q6_K"
            if ("attn_v" in tensor and "70B" in name) or ("72B" in name and "attn_v" in tensor):
                return "Q5_K"
        return "Q4_K"

    def rule(tensor: str, shape: tuple[int, ...]) -> str:
        kind = wanted(tensor)
        return FALLBACK[kind] if kind in FALLBACK and shape[-1] % 256 else kind

    return rule
