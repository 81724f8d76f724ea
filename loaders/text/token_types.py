"""The type of each token: as in the file with llama.cpp's corrections, or guessed if the file has no types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, with SentencePiece's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # found in text only if the caller allows it (parse_special)
    USER_DEFINED = 4  # always found in text, before merging
    UNUSED = 5  # padding rows and retired pieces
    BYTE = 6  # "<0x0A>": a byte of a character without a piece


MATCHED_WHOLE = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
"""Types of tokens that are cut out of a text before merging."""

BYTE_TOKENS = {f"<0x{value:02X}>": value for value in range(256)}
"""The spelling of each byte in a SentencePiece vocabulary -> the byte."""

# Tokens that end a turn or a text, whatever their type: llama.cpp's list and CodeLlama's, without "</s>".
END_OF_GENERATION = frozenset(
    [
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<turn|>",
        "<|tool_response>",
        "<EOT>",
        "_<EOT>",
        "\u2581<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ]
)

# Spellings that convert_hf_to_gguf.py takes for special tokens, and SentencePiece's names.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>|</?s>|<(pad|mask|bos|eos)>", re.DOTALL)


def guessed_types(tokens: Sequence[str], *, sentencepiece: bool) -> np.ndarray:
    """Types guessed from the spelling, for a file without `tokenizer.ggml.token_type`: int8 [vocab_size]."""
    types = np.full(len(tokens), TokenType.NORMAL, dtype=np.int8)
    for index, token in enumerate(tokens):
        if token == "<unk>":
            types[index] = TokenType.UNKNOWN
        elif token in END_OF_GENERATION or _LOOKS_SPECIAL.fullmatch(token):
            types[index] = TokenType.CONTROL
        elif sentencepiece and token in BYTE_TOKENS:
            types[index] = TokenType.BYTE
    return types


def corrected_types(types: np.ndarray, ids: Mapping[str, int], *, sentencepiece: bool) -> np.ndarray:
    """The types, with end tokens as control tokens, and with byte tokens that are typed as words as bytes."""
    types = types.copy()
    types[[ids[text] for text in END_OF_GENERATION & ids.keys()]] = TokenType.CONTROL
    if sentencepiece:
        spelled = [ids[text] for text in BYTE_TOKENS.keys() & ids.keys()]
        types[[index for index in spelled if types[index] == TokenType.NORMAL]] = TokenType.BYTE
    return types


def end_ids(ids: Mapping[str, int], types: np.ndarray, bos_id: int | None) -> set[int]:
    """The tokens that end a turn or a text.

    "</s>" is one of them if it is a control token or BOS is "<s>"; otherwise it is an HTML tag, as in Gemma's
    vocabulary.
    """
    ends = {ids[text] for text in END_OF_GENERATION & ids.keys()}
    closing = ids.get("</s>")
    if closing is not None and (
        types[closing] == TokenType.CONTROL or (bos_id is not None and bos_id == ids.get("<s>"))
    ):
        ends.add(closing)
    return ends
