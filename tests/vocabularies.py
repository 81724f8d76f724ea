"""Small tokenizers made by the libraries that models are trained with, and the metadata a GGUF file would hold."""

from __future__ import annotations

import functools
import io
import json

import numpy as np
import sentencepiece
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "The llama walks over the roof, and the roof holds. It's 1234 steps, isn't it? We'll see!\n\n",
    "def encode(text):\n    return [ord(c) for c in text]  # größe, naïve, 漢字\n",
    "roofline model: attainable = min(peak, bandwidth * intensity)  WE'VE 2026-11-24\r\n\r\n",
] * 3

# What drawn texts are made of: special tokens, words that pre-tokenisers treat apart, and every kind of space.
SPECIAL = ["<|begin|>", "<|end|>", "<|eot|>"]
WORDS = ["<s>", "</s>", "<think>", "the", "roof", "It's", "WE'LL", "2026", "é", "e\u0301", "漢字", "🙂", "½Ⅷ٣"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u2581", "\0", "\u00a0"]
texts = st.lists(st.sampled_from(SPECIAL + WORDS + SPACES) | st.text(max_size=4)).map("".join)


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


def without_tokens(metadata, dropped):
    """The vocabulary of ``metadata`` without the tokens at these ids, which come after those with a role."""
    kept = [i for i in range(len(metadata["tokenizer.ggml.tokens"])) if i not in dropped]
    arrays = ("tokens", "scores", "token_type")
    return metadata | {f"tokenizer.ggml.{k}": [metadata[f"tokenizer.ggml.{k}"][i] for i in kept] for k in arrays}


def published_phi3_metadata():
    """Metadata as in the published Phi-3-mini file: an older converter typed <unk> as control, padding as unknown."""
    metadata = spm_metadata(trained_sentencepiece()) | {"general.architecture": "phi3"}
    added = {"<|endoftext|>": 3, "<|user|>": 4, "<|eot_id|>": 4} | {f"[PAD{i}]": 2 for i in range(3)}
    arrays = {"tokens": list(added), "scores": [-1000.0] * len(added), "token_type": list(added.values())}
    metadata |= {f"tokenizer.ggml.{k}": [*metadata[f"tokenizer.ggml.{k}"], *more] for k, more in arrays.items()}
    metadata["tokenizer.ggml.token_type"][0] = 3
    end = metadata["tokenizer.ggml.tokens"].index("<|end|>")
    metadata["tokenizer.ggml.token_type"][end] = 4
    eos = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    return metadata | {"tokenizer.ggml.eos_token_id": eos, "tokenizer.ggml.padding_token_id": eos}


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_json(*, words=LLAMA3_WORDS, nfc=False, bos=None, special=(), user_defined=()) -> Tokenizer:
    """A tokenizer.json of Llama 3's or Qwen 2's make, with the trained vocabulary."""
    tokens, merges = trained_bpe()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=bos is not None))
    made.normalizer = normalizers.NFC() if nfc else None
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), spell])
    made.decoder = decoders.ByteLevel()
    return _with_special(made, bos, special, user_defined)


def sentencepiece_json(scheme="legacy", *, bos="<s>", user_defined=(), strip_after=()) -> Tokenizer:
    """A tokenizer.json of Llama 2's make: BPE over U+2581 with byte fallback, the trained vocabulary.

    ``scheme``: "legacy" puts the space in by a normaliser, "first" and "always" by a Metaspace pre-tokeniser.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.vocab_size())}
    vocabulary = {piece: index for index, piece in enumerate(scores)}
    pairs = [(p[:i], p[i:]) for p in scores for i in range(1, len(p)) if p[:i] in scores and p[i:] in scores]
    pairs.sort(key=lambda pair: -scores[pair[0] + pair[1]])
    made = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return _with_special(made, bos, ["<unk>", "<s>", "</s>", "<|end|>"], user_defined, strip_after)


def _with_special(made, bos, special, user_defined, strip_after=()):
    made.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=t in strip_after) for t in special])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in user_defined])
    if bos is not None:
        named = [(bos, made.token_to_id(bos))]
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=named)
    return made
