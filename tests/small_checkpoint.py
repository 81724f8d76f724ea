"""A complete checkpoint of 100 KB: architecture llama, quantised, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, CONTEXT = 2, 64, 4, 2, 16, 96, 128
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "ab"]
VOCABULARY = len(TOKENS)


def metadata() -> dict[str, Any]:
    return {
        "general.name": "small",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (VOCABULARY - len(SPECIAL)),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (WIDTH, HIDDEN),
        "ffn_up": (WIDTH, HIDDEN),
        "ffn_down": (HIDDEN, WIDTH),
    }
    names = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return names | {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}


def weights() -> dict[str, np.ndarray]:
    """Float32 values, scaled so that activations stay near 1."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) == 2 else np.ones(shape)).astype(
            np.float32
        )
        for name, shape in shapes().items()
    }


def stored_type(name: str) -> str:
    """A mix of types, in which q, k and v are not all the same."""
    if name.endswith("norm.weight"):
        return "F32"
    return {"token_embd": "Q8_0", "attn_v": "Q5_0", "ffn_down": "F16"}.get(name.split(".")[-2], "Q4_1")


@dataclass
class Parts:
    """The parts of a file, which a test changes before it writes them."""

    architecture: str = "llama"
    metadata: dict[str, Any] = field(default_factory=metadata)
    weights: dict[str, np.ndarray] = field(default_factory=weights)
    types: dict[str, str] = field(default_factory=lambda: {name: stored_type(name) for name in shapes()})

    def write(self, path: Path, *, split_max_tensors: int = 0) -> Path:
        """``split_max_tensors``: tensors per file of a split set; 0 for one file."""
        writer = GGUFWriter(path, self.architecture, split_max_tensors=split_max_tensors)
        for name, value in self.metadata.items():
            _add(writer, name, value)
        for name, value in self.weights.items():
            kind = GGMLQuantizationType[self.types.get(name, "F32")]
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value) if value >= 0 else writer.add_int32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def write_small(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint with some metadata changed."""
    parts = Parts()
    parts.metadata |= changes or {}
    return parts.write(path)
