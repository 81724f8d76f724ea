"""Tiny Hugging Face folders of every family with a tokenizer in them, and GGUF files that say the same."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny_checkpoints import cases, gguf_metadata, gguf_tensors, make_module, write_gguf
from vocabularies import (
    bpe_metadata,
    byte_level_json,
    sentencepiece_json,
    spm_metadata,
    trained_bpe,
    trained_sentencepiece,
)

SPECIAL = ["<|begin|>", "<|end|>", "<|user|>"]
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)
FAMILIES = {
    "llama2": "sentencepiece",
    "llama3": "byte-level",
    "llama3.1": "byte-level",
    "llama3.2-tied": "byte-level",
    "llama-biases": "byte-level",
    "mistral-window": "sentencepiece",
    "qwen2": "byte-level",
    "qwen2-tied-group7": "byte-level",
    "qwen2-window": "byte-level",
    "qwen3": "byte-level",
    "qwen3-tied": "byte-level",
    "phi3-4k": "sentencepiece",
    "phi3-128k": "sentencepiece",
    "phi4-mini": "byte-level",
}
"""Case -> the kind of tokenizer that its family has."""


@cache
def module(name: str) -> PreTrainedModel:
    """Case ``name`` of ``tiny_checkpoints`` with rows for a tokenizer."""
    config = copy.deepcopy(cases()[name].config)
    config.vocab_size = len(tokenizer(name))
    return make_module(config)


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    if FAMILIES[name] == "sentencepiece":
        made = sentencepiece_json(strip_after=["</s>", "<|end|>"] if name.startswith("phi3") else [])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        bos = "<|begin|>" if name.startswith("llama") else None
        made = byte_level_json(bos=bos, special=SPECIAL)
        names = {"bos_token": bos, "eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template(name), **names)


def template(name: str) -> str:
    """SentencePiece's trained vocabulary has no <|user|>."""
    return TEMPLATE.replace("<|user|>", "</s>") if FAMILIES[name] == "sentencepiece" else TEMPLATE


def write_folder(name: str, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    module(name).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer(name).save_pretrained(folder)
    return folder


def write_file(name: str, path: Path) -> Path:
    """The GGUF file that says the same."""
    metadata = gguf_metadata(module(name).config) | dict(cases()[name].extra or {})
    if FAMILIES[name] == "sentencepiece":
        tokens = spm_metadata(trained_sentencepiece())
    else:
        words, merges = trained_bpe()
        bos = {"bos_token_id": len(words)} if name.startswith("llama") else {"add_bos_token": False}
        pre = "llama-bpe" if name.startswith("llama") else "smaug-bpe"
        types = [1] * len(words) + [3] * len(SPECIAL)
        tokens = bpe_metadata([*words, *SPECIAL], merges, pre=pre, types=types, eos_token_id=len(words) + 1, **bos)
    tokens["tokenizer.chat_template"] = template(name)
    tokens = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in tokens.items()}
    return write_gguf(path, metadata | tokens, gguf_tensors(module(name)))
