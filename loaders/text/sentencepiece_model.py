"""Translating tokenizer.model, a SentencePiece model file, to the metadata of a GGUF file.

The file is a Protocol Buffers message. Its pieces are read, and the settings that affect encoding.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from .settings import AddedToken, TokenizerSettings, refuse
from .token_types import TokenType

TAKE_JSON = "Get the model's tokenizer.json"


def sentencepiece_metadata(path: Path, settings: TokenizerSettings) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` for this file and the settings of the folder.

    Raises:
        TokenizerError: the file is not a SentencePiece model of type BPE, or contradicts the other files.
    """
    model = _read(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces:
        refuse(path, "no pieces", "a SentencePiece model has pieces (Llama 3's original file is not one)", TAKE_JSON)
    if (kind := trainer.model_type) != TrainerSpec.BPE:
        rule = f"the tokenizers of these families are BPE, which is {TrainerSpec.BPE}"
        refuse(path, f"model_type {kind}", rule, TAKE_JSON)
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        refuse(path, "treat_whitespace_as_suffix, or no escape_whitespaces", "spaces go before words", TAKE_JSON)
    tokens = [piece.piece for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    _extend(tokens, scores, types, settings, path)
    ids = {token: index for index, token in enumerate(tokens)}
    metadata = {
        "general.architecture": settings.arch,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "tokenizer.ggml.precompiled_charsmap": np.frombuffer(normalizer.precompiled_charsmap, np.uint8),
        "tokenizer.ggml.add_bos_token": settings.add_bos,
        "tokenizer.ggml.add_eos_token": settings.add_eos,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        metadata[f"tokenizer.ggml.{key}_token_id"] = ids.get(settings.named.get(name, ""))
    return {key: value for key, value in metadata.items() if value is not None}


def _read(path: Path) -> ModelProto:
    """Parse the file. Refuses pieces that are not text, and known fields whose values the parser set aside."""
    rule = "the file is one message of pieces and settings, as sentencepiece_model.proto has them"
    try:
        model = ModelProto.FromString(path.read_bytes())
    except (DecodeError, UnicodeDecodeError) as error:
        refuse(path, f"not a SentencePiece model ({error})", rule, TAKE_JSON)
    for message in (model, model.trainer_spec, model.normalizer_spec, *model.pieces):
        if found := _set_aside(message):
            refuse(path, f"not a SentencePiece model ({found})", rule, TAKE_JSON)
    # Protocol Buffers returns text that is not UTF-8 as bytes.
    if bad := [p.piece for p in model.pieces if not isinstance(p.piece, str)]:
        refuse(path, f"not a SentencePiece model (piece {bad[0]!r:.60})", "pieces are UTF-8", TAKE_JSON)
    return model


def _set_aside(message: Message) -> str | None:
    """A value that Protocol Buffers ignores: its wire type is not the field's, or its number is not in the enum."""
    fields = message.DESCRIPTOR.fields_by_number
    for value in UnknownFieldSet(message):
        if value.field_number in fields:
            return f"{message.DESCRIPTOR.name}.{fields[value.field_number].name} = {value.data!r:.60}"
    return None


def _extend(tokens: list[str], scores: list[float], types: list[int], settings: TokenizerSettings, path: Path) -> None:
    """Append the added tokens, and set the types of those that are pieces already."""
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
                "with a tokenizer.model, added tokens are matched exactly",
                TAKE_JSON,
            )
    added = {token.content for token in settings.added.values()}
    ids = {token: index for index, token in enumerate(tokens)}
    for text in settings.special_texts:
        if text not in ids:
            settings.allow_new(text, len(tokens), path)
            ids[text] = len(tokens)
            tokens.append(text)
            scores.append(0.0)
            types.append(TokenType.CONTROL)
        index, role = ids[text], settings.unused_role(text)
        if role and text not in added and types[index] == TokenType.NORMAL:
            warnings.warn(f"{path}: {text!r}, the {role}_token of another file, is a word and stays one", stacklevel=5)
        else:
            types[index] = _type(AddedToken(text, special=True), types[index])


def _type(token: AddedToken, kind: int) -> int:
    if kind == TokenType.UNKNOWN:
        return kind
    return TokenType.CONTROL if token.special else TokenType.USER_DEFINED
