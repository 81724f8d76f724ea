"""Byte-level BPE (`tokenizer.ggml.model` = "gpt2"): Llama 3, Qwen, SmolLM2, Phi-4-mini.

The pre-tokeniser's regular expressions cut text into words, each word's UTF-8 bytes are spelled in GPT-2's alphabet of
256 visible characters, and merges are applied in order of rank. Text is not normalised, since GGUF records no
normalisation and llama.cpp applies none; so decoding returns the text that was encoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import tokenizers
from tokenizers import models, pre_tokenizers

from .token_types import TokenType
from .vocabulary import Metadata, TokenizerError, Vocabulary, read_string, read_strings, refuse

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _CASED % (_CONTRACTION + "?", _CONTRACTION + "?", r"\p{N}{1,3}")
_TEKKEN = _CASED % ("", "", r"\p{N}")


class PreTokenizer(NamedTuple):
    """How text is cut into words before merging.

    Each pattern cuts the pieces of the previous one: its matches and the text between them become pieces.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is encoded as that token, whatever the merges
    add_bos: bool = False  # the default if the file does not say


# Rules, and their names in `tokenizer.ggml.pre`, grouped as in llama.cpp. Any other name is refused.
_NAMES = (
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 lfm2 midm-2.0 pixtral",
    ),
    (PreTokenizer((_LLAMA3,)), "smaug-bpe dbrx chatglm-bpe glm4"),  # SmolLM3; Phi-4, OLMo 2, Granite 4
    (
        PreTokenizer((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
        "qwen2 deepseek-r1-qwen f2llmv2 grok-2 hunyuan kormo megrez solar-open stablelm2",
    ),
    (PreTokenizer((_O200K,)), "gpt-4o kanana2 llama4 minimax-m2"),  # Phi-4-mini
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),  # Mistral Nemo and Small 3
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        "smollm codeshell command-r exaone minerva-7b refact starcoder",  # refact: Granite 3
    ),
    (PreTokenizer((_GPT2,)), "gpt-2 a.x-4.0 exaone4 gigachat granite-docling jais mellum mpt olmo phi-2 trillion"),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
)
PRE_TOKENIZERS = {name: rules for rules, names in _NAMES for name in names.split()}


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: its Latin-1 character if visible, else the next one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelled = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [spelled[byte] for byte in range(256)]


BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {ord(character): byte for byte, character in enumerate(BYTE_ALPHABET)}


def read_pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    """The pre-tokeniser of the file. Without a name it is llama.cpp's "default", with a warning."""
    name = read_string(metadata, key := "tokenizer.ggml.pre")
    if not name:
        warnings.warn(
            "tokenizer.ggml.pre is missing: words are cut by the 'default' rules, which few models are trained with. "
            "Convert the model again with a current convert_hf_to_gguf.py.",
            stacklevel=4,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        refuse(
            metadata,
            key,
            f"{key} = {name!r}",
            f"the pre-tokeniser must be one of {', '.join(sorted(PRE_TOKENIZERS))}",
            "If its rules equal one of these, set tokenizer.ggml.pre to that name with gguf_set_metadata.py",
        )
    return PRE_TOKENIZERS[name]


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of the tokenizers library as TokenizerError.

    Its PanicException is not an Exception, so it would end a program that catches those; only its name identifies it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"the tokenizers library failed on the text ({error})",
            rule="the tokenizer's patterns cut a text in a bounded number of steps",
            remedy="Shorten the text, or use the tokenizer of the model's original checkpoint",
        ) from None


def word_splitter(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """A pre-tokeniser that cuts text into words, spelled in the byte alphabet."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in rules.patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, spell])


class ByteLevelBPE:
    """Encodes plain text to ids, and decodes ids to bytes. Text reaches it without special tokens."""

    add_space_prefix = False

    def __init__(self, vocabulary: Vocabulary, metadata: Metadata):
        self._vocabulary = vocabulary
        rules = read_pre_tokenizer(metadata)
        self.add_bos = rules.add_bos
        self._missing_bytes = frozenset(
            byte for byte, character in enumerate(BYTE_ALPHABET) if character not in vocabulary.ids
        )
        merges = _read_merges(vocabulary, metadata)
        model = models.BPE(_reachable_from_text(vocabulary, merges), merges, ignore_merges=rules.ignore_merges)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = word_splitter(rules)

    @panics_as_errors()
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, which holds no special tokens.

        Raises:
            TokenizerError: the vocabulary has no token for a byte of the text, or the library fails.
        """
        refuse_missing_bytes(text, self._missing_bytes)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for."""
        token = self._vocabulary.tokens[token_id]
        if self._vocabulary.types[token_id] != TokenType.NORMAL:
            return token.encode()
        return bytes_of_spelling(token)


def bytes_of_spelling(token: str) -> bytes:
    """The bytes that a token spells in the byte alphabet, or its UTF-8 if it uses other characters."""
    try:
        return bytes([_BYTE_OF[ord(character)] for character in token])
    except KeyError:
        return token.encode()


def refuse_missing_bytes(text: str, missing_bytes: frozenset[int]) -> None:
    """Raise TokenizerError if ``text`` needs a byte for which the vocabulary has no token."""
    if missing_bytes and (missing := missing_bytes.intersection(text.encode())):
        index, character = next((i, c) for i, c in enumerate(text) if missing.intersection(c.encode()))
        raise TokenizerError(
            f"character {character!r} (U+{ord(character):04X}), at {index} in a piece of the text",
            rule="this vocabulary has no token for one of its bytes",
            remedy="Remove or replace the character",
        )


def _read_merges(vocabulary: Vocabulary, metadata: Metadata) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    lines = read_strings(metadata, key)
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    ids = vocabulary.ids
    for index, (left, right) in enumerate(merges):
        if left not in ids or right not in ids or left + right not in ids:
            unknown = next(token for token in (left, right, left + right) if token not in ids)
            rule = f"a merge joins two tokens into a third; {unknown!r} is not a token"
            refuse(metadata, key, f"{key}[{index}] = {lines[index]!r}", rule)
    return list(dict.fromkeys(merges))  # a repeated pair keeps its first rank, as in llama.cpp


def _reachable_from_text(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> dict[str, int]:
    """The vocabulary without control tokens that no merge makes, so that `ignore_merges` finds none in plain text."""
    controls = [vocabulary.tokens[i] for i in vocabulary.of_type(TokenType.CONTROL)]
    if not controls:
        return vocabulary.ids
    merged = {left + right for left, right in merges}.union(*merges, BYTE_ALPHABET)
    hidden = set(controls) - merged
    return {token: index for token, index in vocabulary.ids.items() if token not in hidden}
