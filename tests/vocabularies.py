"""Small tokenizers made by the libraries that models are trained with, and the metadata a GGUF file would hold."""

from __future__ import annotations

import functools
import io
import json

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = [
    "The llama walks over the roof, and the roof holds. It's 1234 steps, isn't it? We'll see!\n\n",
    "def encode(text):\n    return [ord(c) for c in text]  # größe, naïve, 漢字\n",
    "roofline model: attainable = min(peak, bandwidth * intensity)  WE'VE 2026-11-24\r\n\r\n",
] * 3


def bpe_metadata(tokens, merges, *, pre="gpt-2", types=None, **keys):
    """Metadata of a "gpt2" vocabulary; ``keys`` are further `tokenizer.ggml.` keys, None drops one."""
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types or [1] * len(tokens), dtype=np.int32),
        "tokenizer.ggml.merges": merges,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {key: value for key, value in values.items() if value is not None}


@functools.cache
def trained_bpe() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE trained on ``TEXT``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = tokenizer.get_vocab()
    state = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.__getitem__), [" ".join(merge) for merge in state]


@functools.cache
def trained_sentencepiece(byte_fallback: bool = True) -> bytes:
    """A SentencePiece BPE model file as Llama 2's was made: identity normaliser, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT * 20 for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=430 if byte_fallback else 150,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.995,
        control_symbols=["<|end|>"],
        minloglevel=2,
    )
    return model.getvalue()


def spm_metadata(model: bytes, **keys):
    """Metadata of a "llama" vocabulary with the pieces of a SentencePiece model file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())

    def kind(i):
        special = processor.is_unknown(i) * 2 or processor.is_control(i) * 3
        return special or processor.is_unused(i) * 5 or processor.is_byte(i) * 6 or 1

    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([processor.get_score(i) for i in ids], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], dtype=np.int32),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {key: value for key, value in values.items() if value is not None}
