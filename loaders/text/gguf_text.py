"""Encoding text as GGUF metadata describes it: special tokens are cut out, and one of two models encodes the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

from .bpe import ByteLevelBPE
from .spm import SentencePieceBPE
from .token_types import MATCHED_WHOLE, TokenType
from .vocabulary import Metadata, Vocabulary

# Unicode's White_Space, as the tokenizers library strips it; str.isspace also accepts information separators.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SKIP_WHITESPACE = re.compile(f"[{_WHITESPACE}]*")


class SpecialTokens:
    """Finds whole tokens in text, from left to right; of tokens that start at one place, the longest.

    Args:
        ids: the text of each token -> its id.
        strip_after: ids of tokens that remove the whitespace after them.
    """

    def __init__(self, ids: Mapping[str, int], strip_after: Iterable[int] = ()):
        self._ids = dict(ids)
        self._strip_after = frozenset(strip_after)
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(token[0], len(token)) for token in ids}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._starts = re.compile(f"[{re.escape(''.join(self._lengths))}]") if ids else None

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: the id of each special token, and each non-empty string between them."""
        begin = at = 0
        while self._starts and (start := self._starts.search(text, at)):
            at = start.start()
            token = self._token_at(text, at)
            if token is None:
                at += 1
                continue
            if begin < at:
                yield text[begin:at]
            token_id = self._ids[token]
            yield token_id
            begin = at = self._end_of(token_id, text, at + len(token))
        if begin < len(text):
            yield text[begin:]

    def _token_at(self, text: str, at: int) -> str | None:
        candidates = (text[at : at + length] for length in self._lengths[text[at]])
        return next((token for token in candidates if token in self._ids), None)

    def _end_of(self, token_id: int, text: str, end: int) -> int:
        if token_id in self._strip_after and (space := _SKIP_WHITESPACE.match(text, end)):
            return space.end()
        return end


class PlainText(Protocol):
    """Encodes plain text to ids, and decodes ids to bytes. Text reaches it without special tokens.

    Attributes:
        add_bos: whether to add BOS if the file does not say.
        add_space_prefix: whether a text, or the text after a special token, is encoded with a space before it.
    """

    add_bos: bool
    add_space_prefix: bool

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


# `tokenizer.ggml.model` -> the encoder of plain text. Any other value is refused.
MODELS: dict[str, Callable[[Vocabulary, Metadata], PlainText]] = {"gpt2": ByteLevelBPE, "llama": SentencePieceBPE}


class GGUFText:
    """Encodes text with special tokens to ids, and decodes ids to bytes. ``add_bos`` is that of ``PlainText``."""

    unprefixed: Collection[TokenType] = (*MATCHED_WHOLE, TokenType.BYTE)

    def __init__(self, vocabulary: Vocabulary, metadata: Metadata):
        self._plain = MODELS[vocabulary.model](vocabulary, metadata)
        self.add_bos = self._plain.add_bos
        self.add_space_prefix = self._plain.add_space_prefix
        self._matched_whole = frozenset(vocabulary.of_type(*MATCHED_WHOLE))
        everything = self._texts(self._matched_whole)
        strip_after = _phi3_strips_after(vocabulary, everything)
        self._user_defined = SpecialTokens(self._texts(vocabulary.of_type(TokenType.USER_DEFINED)), strip_after)
        self._everything = SpecialTokens(everything, strip_after)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        ids: list[int] = []
        at_boundary = True
        for part in (self._everything if parse_special else self._user_defined).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._plain.encode(" " + part if at_boundary and self.add_space_prefix else part)
            at_boundary = isinstance(part, int)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._plain.token_bytes(token_id)

    def space_follows(self, token_id: int) -> bool:
        return self.add_space_prefix and token_id in self._matched_whole

    def _texts(self, token_ids: Iterable[int]) -> dict[str, int]:
        """The text of each token -> its id."""
        return {self.token_bytes(token_id).decode(): token_id for token_id in token_ids}


def _phi3_strips_after(vocabulary: Vocabulary, special: Mapping[str, int]) -> set[int]:
    """The special tokens that remove the whitespace after them: all but three of Phi-3 and Phi-3.5.

    Their Hugging Face tokenizers declare it (`rstrip`); GGUF has no key for it. llama.cpp looks for "phi3" in the name
    of the model; here the architecture decides, together with a SentencePiece vocabulary.
    """
    if vocabulary.arch != "phi3" or vocabulary.model != "llama":
        return set()
    return {token_id for text, token_id in special.items() if text not in ("<unk>", "<s>", "<|endoftext|>")}
