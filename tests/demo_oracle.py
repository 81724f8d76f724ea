"""transformers' Llama in float32, with the demo checkpoint's weights as the gguf package dequantises them."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import pytest
import torch

from rooflama import demo_checkpoint
from rooflama.loaders.opening import UnknownCheckpointError

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at a temperature of",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
]


@functools.cache
def checkpoint_path():
    """The demo checkpoint's path. Skips the test, with the way to install it, if it is missing."""
    try:
        return demo_checkpoint()
    except UnknownCheckpointError as error:
        pytest.skip(str(error))


def _half_split(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the converter's interleaving of rotary pairs: [heads, d/2, 2, in] -> [heads, 2, d/2, in]."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@functools.cache
def transformers_llama():
    """LlamaForCausalLM in float32 on the CPU. Independent of rooflama's reader, repacking and kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(checkpoint_path())
    field = {name: f.contents() for name, f in reader.fields.items() if name.startswith("llama.")}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                state["model.embed_tokens.weight"] = state["lm_head.weight"] = value
            case ["output_norm", "weight"]:
                state["model.norm.weight"] = value
            case ["blk", layer, name, "weight"]:
                if name in ("attn_q", "attn_k"):
                    value = _half_split(value, heads if name == "attn_q" else kv_heads)
                state[f"model.layers.{layer}.{names[name]}.weight"] = value
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    model.load_state_dict(tensors, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model.eval()


@torch.no_grad()
def greedy(prompt_ids: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """The oracle's greedy continuation, and per token the difference of the two best logits."""
    model = transformers_llama()
    ids, cache, tokens, margins = torch.tensor([prompt_ids]), None, [], []
    for _ in range(num_tokens):
        result = model(ids, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        best = result.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        ids = best.indices[:1].view(1, 1)
    return tokens, margins
