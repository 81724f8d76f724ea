"""How a GGUF file's metadata encodes text: special tokens are cut out first, one of two models takes the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from .bpe import ByteLevelBPE
from .special_tokens import SpecialTokens
from .spm import SentencePieceBPE
from .token_types import MATCHED_WHOLE, TokenType
from .vocabulary import Metadata, Vocabulary


class PlainText(Protocol):
    """Plain text to ids and ids to bytes; special tokens are cut out before.

    Attributes:
        add_bos: whether BOS is added where the file does not say.
        add_space_prefix: whether a text, and what follows a special token, is encoded with a space before it.
    """

    add_bos: bool
    add_space_prefix: bool

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


# `tokenizer.ggml.model` -> what encodes plain text. What is not here raises.
MODELS: dict[str, Callable[[Vocabulary, Metadata], PlainText]] = {"gpt2": ByteLevelBPE, "llama": SentencePieceBPE}


class GGUFText:
    """Text to ids and ids to bytes, special tokens included; attributes as ``PlainText``."""

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
        """How special tokens look in text -> their ids."""
        return {self.token_bytes(token_id).decode(): token_id for token_id in token_ids}


def _phi3_strips_after(vocabulary: Vocabulary, special: Mapping[str, int]) -> set[int]:
    """The special tokens that swallow the whitespace after them: Phi-3's and 3.5's, all but three.

    Their Hugging Face tokenizers say so (`rstrip`), GGUF has no key for it; llama.cpp goes by "phi3" in the model's
    name, here it is the architecture with a SentencePiece vocabulary.
    """
    if vocabulary.arch != "phi3" or vocabulary.model != "llama":
        return set()
    return {token_id for text, token_id in special.items() if text not in ("<unk>", "<s>", "<|endoftext|>")}
