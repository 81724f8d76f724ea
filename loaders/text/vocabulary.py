"""Reading and checking the vocabulary in a GGUF file's metadata: tokens, their types, special ids and flags.

Metadata is untrusted. The type and length of every array and the range of every id are checked here, so that the
tokenizers never receive an inconsistent vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from rooflama.kernels.errors import RooflamaError

from ..gguf.metadata import place
from .token_types import TokenType, corrected_types, end_ids, guessed_types

Metadata = Mapping[str, Any]


class TokenizerError(RooflamaError, ValueError):
    """A tokenizer that cannot be read, or text that its vocabulary cannot encode."""


_RECONVERT = "Convert the model again with a current convert_hf_to_gguf.py"


def refuse(metadata: Metadata, key: str, found: str, rule: str, remedy: str = _RECONVERT) -> NoReturn:
    """Raise TokenizerError about the value at ``key``, with the file and byte if the metadata knows them."""
    raise TokenizerError(place(metadata, key) + found, rule=rule, remedy=remedy)


def warn(metadata: Metadata, key: str, text: str) -> None:
    """Warn about the value at ``key``, with the file and byte if the metadata knows them."""
    warnings.warn(place(metadata, key) + text, stacklevel=2)


def read_string(metadata: Metadata, key: str) -> str | None:
    """The string at ``key``; None if the key is missing."""
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        refuse(metadata, key, f"{key} is a {type(value).__name__}", "it must be a string")
    return value


def read_flag(metadata: Metadata, key: str, default: bool) -> bool:
    """The boolean at ``key``; ``default`` if the key is missing."""
    value = metadata.get(key, default)
    if not isinstance(value, bool | np.bool_):
        refuse(metadata, key, f"{key} = {value!r}", "it must be a boolean")
    return bool(value)


def read_strings(metadata: Metadata, key: str) -> list[str]:
    """The array of strings at ``key``, which must exist."""
    value = metadata.get(key)
    if value is None:
        refuse(metadata, key, f"{key} is missing", "this kind of tokenizer needs it")
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        refuse(metadata, key, f"{key} is a {type(value).__name__}", "it must be an array")
    strings = list(value)
    if not set(map(type, strings)) <= {str}:
        index, item = next((i, s) for i, s in enumerate(strings) if type(s) is not str)
        refuse(metadata, key, f"{key}[{index}] = {item!r}", "every element must be a string")
    return strings


def _read_numbers(metadata: Metadata, key: str, kinds: str, length: int) -> np.ndarray:
    value = metadata.get(key)
    if value is None:
        refuse(metadata, key, f"{key} is missing", "this kind of tokenizer needs it")
    try:
        array = np.asarray(value)
    except ValueError:  # ragged nesting
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        wanted = "whole numbers" if "f" not in kinds else "numbers"
        found = f"{key} holds {array.dtype} in {array.ndim} dimensions"
        refuse(metadata, key, found, f"it must be a flat array of {wanted}")
    if len(array) != length:
        found = f"{key} has {len(array)} elements and tokenizer.ggml.tokens has {length}"
        refuse(metadata, key, found, "both must have the same length")
    return array


def _read_types(metadata: Metadata, tokens: list[str], ids: Mapping[str, int], *, sentencepiece: bool) -> np.ndarray:
    key = "tokenizer.ggml.token_type"
    if metadata.get(key) is None:
        warn(
            metadata,
            key,
            f"{key} is missing: tokens that look like <|this|>, or have names such as <s>, are read as control tokens, "
            "all others as text",
        )
        return guessed_types(tokens, sentencepiece=sentencepiece)
    stored = _read_numbers(metadata, key, "iu", len(tokens))
    known = np.isin(stored, list(TokenType))
    if not known.all():
        index = int(np.argmin(known))
        rule = "token types are 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte"
        refuse(metadata, key, f"{key}[{index}] = {stored[index]}", rule)
    stored = stored.astype(np.int8)
    types = corrected_types(stored, ids, sentencepiece=sentencepiece)
    if (changed := np.flatnonzero(types != stored)).size:
        named = ", ".join(repr(tokens[i]) for i in changed[:4]) + (", ..." if changed.size > 4 else "")
        warn(metadata, key, f"{key} mistypes {named}: read as what they spell, the end of a turn or a byte")
    return types


def _read_special(metadata: Metadata, name: str, vocab_size: int) -> int | None:
    """The id at `tokenizer.ggml.NAME_token_id`; None, with a warning, if it is not in the vocabulary."""
    key = f"tokenizer.ggml.{name}_token_id"
    value, rule = metadata[key], f"it must be an id of the vocabulary, 0 to {vocab_size - 1}"
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        refuse(metadata, key, f"{key} = {value!r}", rule)
    if 0 <= value < vocab_size:
        return int(value)
    if name == "eos":
        refuse(metadata, key, f"{key} = {value!r}", rule)
    warn(metadata, key, f"{key} = {value} is not in the vocabulary, ids 0 to {vocab_size - 1}; it is not used")
    return None


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    Attributes:
        tokens: the text of each id, as stored: in the byte-level alphabet, or with SentencePiece's escapes.
        ids: text -> id.
        types: int8 [vocab_size], values of TokenType.
        model: "gpt2" or "llama", or "tokenizer.json".
        arch: `general.architecture`, "" if missing.
        bos_id, eos_id, unk_id, pad_id: None if the file names none.
        eos_ids: every id that ends generation.
    """

    tokens: list[str]
    ids: dict[str, int]
    types: np.ndarray
    model: str
    arch: str
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    eos_ids: frozenset[int]

    @classmethod
    def from_metadata(cls, metadata: Metadata, models: Collection[str]) -> Vocabulary:
        """Read and check a vocabulary; ``models`` are the supported values of `tokenizer.ggml.model`.

        Raises:
            TokenizerError: an array is missing or has a wrong type or length, tokens repeat, or an id is out of range.
        """
        model = read_string(metadata, key := "tokenizer.ggml.model")
        if model is None or model not in models:
            refuse(
                metadata,
                key,
                f"{key} is missing" if model is None else f"{key} = {model!r}",
                f"supported kinds of tokenizer are {', '.join(models)}",
                "Use a model of the Llama, Qwen or Phi-3 families",
            )
        tokens = read_strings(metadata, key := "tokenizer.ggml.tokens")
        if not tokens:
            refuse(metadata, key, f"{key} is empty", "a vocabulary has tokens")
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            index = next(i for i, token in enumerate(tokens) if ids[token] != i)
            found = f"{key}[{index}] = {tokens[index]!r} occurs again at {ids[tokens[index]]}"
            refuse(metadata, key, found, "tokens must be distinct")
        if "" in ids:
            refuse(metadata, key, f"{key}[{ids['']}] = ''", "a token must not be empty")
        types = _read_types(metadata, tokens, ids, sentencepiece=model == "llama")

        def special(name: str, customary: int | None = None) -> int | None:
            """The id that the file names, else SentencePiece's customary id if its token is special."""
            if metadata.get(f"tokenizer.ggml.{name}_token_id") is not None:
                named = _read_special(metadata, name, len(tokens))
                if named is not None or name != "unknown":
                    return named
            if model != "llama" or customary is None or customary >= len(tokens):
                return None
            return customary if types[customary] in (TokenType.CONTROL, TokenType.UNKNOWN) else None

        bos_id, eos_id = special("bos", 1), special("eos", 2)
        ends = {eos_id, special("eot"), special("eom")} | end_ids(ids, types, bos_id)
        return cls(
            tokens=tokens,
            ids=ids,
            types=types,
            model=model,
            arch=read_string(metadata, "general.architecture") or "",
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=special("unknown", 0),
            pad_id=special("padding"),
            eos_ids=frozenset(end for end in ends if end is not None),
        )

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids whose type is one of ``types``, in ascending order."""
        return np.flatnonzero(np.isin(self.types, types)).tolist()

    def scores(self, metadata: Metadata) -> np.ndarray:
        """`tokenizer.ggml.scores` as float32 [vocab_size], finite."""
        key = "tokenizer.ggml.scores"
        scores = _read_numbers(metadata, key, "fiu", len(self.tokens)).astype(np.float32)
        if not np.isfinite(scores).all():
            index = int(np.argmin(np.isfinite(scores)))
            refuse(metadata, key, f"{key}[{index}] = {scores[index]}", "scores must be finite")
        return scores
