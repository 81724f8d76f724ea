"""Configs of well-known models, and the types that llama.cpp gives their tensors."""

from rooflama.models import ModelConfig, RopeSpec

# name: layers, hidden, query heads, K/V heads, head_dim, feed-forward, vocabulary, tied, q/k/v biases, QK norm
SHAPES = {
    "Llama-2-7B": (32, 4096, 32, 32, 128, 11008, 32000, False, False, False),
    "Llama-2-13B": (40, 5120, 40, 40, 128, 13824, 32000, False, False, False),
    "Llama-2-70B": (80, 8192, 64, 8, 128, 28672, 32000, False, False, False),
    "Llama-3-8B": (32, 4096, 32, 8, 128, 14336, 128256, False, False, False),
    "Llama-3-70B": (80, 8192, 64, 8, 128, 28672, 128256, False, False, False),
    "Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, True, False, False),
    "Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128256, True, False, False),
    "Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151936, True, True, False),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151936, True, True, False),
    "Qwen2.5-7B": (28, 3584, 28, 4, 128, 18944, 152064, False, True, False),
    "Qwen2.5-14B": (48, 5120, 40, 8, 128, 13824, 152064, False, True, False),
    "Qwen2.5-72B": (80, 8192, 64, 8, 128, 29568, 152064, False, True, False),
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936, True, False, True),
    "Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, False, False, True),
    "Phi-3-mini": (32, 3072, 32, 32, 96, 8192, 32064, False, False, False),
    "Phi-3-medium": (40, 5120, 40, 10, 128, 17920, 32064, False, False, False),
    "TinyLlama": (22, 2048, 32, 4, 64, 5632, 32000, False, False, False),
    "SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49152, True, False, False),
    "SmolLM2-1.7B": (24, 2048, 32, 32, 64, 8192, 49152, True, False, False),
}

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
