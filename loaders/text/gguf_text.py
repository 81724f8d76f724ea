"""Encoding text as GGUF metadata describes it: special tokens are cut out, and one of two models encodes the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from .bpe import ByteLevelBPE
from .special_tokens import SpecialTokens
from .spm import SentencePieceBPE
from .token_types import MATCHED_WHOLE, TokenType
from .vocabulary import Metadata, Vocabulary


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
