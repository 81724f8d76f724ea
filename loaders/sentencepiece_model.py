"""tokenizer.model: a SentencePiece model file, as the metadata that a GGUF file would hold of it.

The file is a Protocol Buffers message. Read are the pieces, and the settings that decide how text is encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .tokenizer_settings import AddedToken, TokenizerSettings, refuse
from .vocabulary import TokenType

BPE = 2  # trainer_spec.model_type
TAKE_JSON = "Get the model's tokenizer.json"


def sentencepiece_metadata(path: Path, settings: TokenizerSettings) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of this file, with what the folder's other files say.

    Raises:
        TokenizerError: the file is no SentencePiece model, of another kind than BPE, or contradicts the other files.
    """
    try:
        fields = _Fields(path.read_bytes())
        pieces = [_Fields(piece) for piece in fields.all(1)]
        trainer, normalizer = (_Fields(b"".join(fields.all(number))) for number in (2, 3))
        tokens = [piece.last(1, b"").decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.last(2, bytes(4)))[0] for piece in pieces]
        types = [piece.last(3, int(TokenType.NORMAL)) for piece in pieces]
    except (ValueError, struct.error, TypeError, AttributeError) as error:
        refuse(path, f"no SentencePiece model ({error})", "the file is one message of pieces and settings", TAKE_JSON)
    if not tokens:
        refuse(path, "no pieces", "a SentencePiece model has pieces (Llama 3's original file is none)", TAKE_JSON)
    if (kind := trainer.last(3, 1)) != BPE:
        refuse(path, f"model_type {kind}", f"the tokenizers of these families are BPE, which is {BPE}", TAKE_JSON)
    if trainer.last(24, 0) or not normalizer.last(5, 1):
        refuse(path, "treat_whitespace_as_suffix, or no escape_whitespaces", "spaces go before words", TAKE_JSON)
    _extend(tokens, scores, types, settings, path)
    ids = {token: index for index, token in enumerate(tokens)}
    if missing := [text for text in settings.named.values() if text not in ids]:
        refuse(path, f"no token {missing[0]!r}", "the special tokens that the other files name are in the vocabulary")
    metadata = {
        "general.architecture": settings.arch,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.add_space_prefix": bool(normalizer.last(3, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.last(4, 1)),
        "tokenizer.ggml.precompiled_charsmap": np.frombuffer(normalizer.last(2, b""), dtype=np.uint8),
        "tokenizer.ggml.add_bos_token": settings.add_bos,
        "tokenizer.ggml.add_eos_token": settings.add_eos,
        "tokenizer.chat_template": settings.chat_template,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        metadata[f"tokenizer.ggml.{key}_token_id"] = ids[settings.named[name]] if name in settings.named else None
    return {key: value for key, value in metadata.items() if value is not None}


def _extend(tokens: list[str], scores: list[float], types: list[int], settings: TokenizerSettings, path: Path) -> None:
    """Append the added tokens, and type those that are pieces already as what they are."""
    for token_id, token in sorted(settings.added.items()):
        if token_id == len(tokens):
            tokens.append(token.content)
            scores.append(0.0)
            types.append(TokenType.NORMAL)
        if token_id > len(tokens) or tokens[token_id] != token.content:
            here = repr(tokens[token_id]) if token_id < len(tokens) else f"the end, {len(tokens)} pieces"
            refuse(
                path,
                f"{here} at id {token_id}, where the other files have {token.content!r}",
                "added tokens follow the pieces, or are pieces",
            )
        types[token_id] = _type(token, types[token_id])
        if settings.arch != "phi3" and (token.lstrip or token.rstrip or token.single_word):
            refuse(
                path,
                f"added token {token.content!r} strips spaces or matches whole words only",
                "beside a tokenizer.model, added tokens are matched as they stand",
                TAKE_JSON,
            )
    for text in {*settings.named.values(), *settings.further} & set(tokens):
        index = tokens.index(text)
        types[index] = _type(AddedToken(text, special=True), types[index])


def _type(token: AddedToken, kind: int) -> int:
    if kind == TokenType.UNKNOWN:
        return kind
    return TokenType.CONTROL if token.special else TokenType.USER_DEFINED


class _Fields:
    """The fields of a Protocol Buffers message: number -> values in order (int, or bytes)."""

    def __init__(self, data: bytes):
        self._values: dict[int, list[Any]] = {}
        for number, value in _parse(data):
            self._values.setdefault(number, []).append(value)

    def all(self, number: int) -> list[Any]:
        return self._values.get(number, [])

    def last(self, number: int, default: Any) -> Any:
        """The value that counts of a field that occurs once; ``default`` gives its type too."""
        value = self._values.get(number, [default])[-1]
        if type(value) is not type(default):
            raise ValueError(f"field {number} is a {type(value).__name__}")
        return value


def _parse(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): an int for wire type 0, bytes for 1, 2 and 5."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise ValueError(f"it ends inside a number at byte {at}")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError(f"a number of more than ten bytes before byte {at}")

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError(f"field {number} of wire type {wire} before byte {at}")
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at}, of {len(data)}")
        yield number, data[at : at + size]
        at += size
