"""The numbers of well-known models."""

from __future__ import annotations

from hypothesis import strategies as st

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

model_names = st.sampled_from(list(SHAPES))
