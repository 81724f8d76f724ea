"""SentencePiece vocabularies (`tokenizer.ggml.model` = "llama"): Llama 2, TinyLlama, Mistral, Phi-3.

The sentencepiece library merges: it is given a model file made from the tokens, scores and types. Text is not
normalised, as in all these models, except that spaces become U+2581; so only a text that contains U+2581 decodes to
another text (with spaces). The caller adds the space before a text.
"""

from __future__ import annotations

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from .token_types import BYTE_TOKENS, TokenType
from .vocabulary import Metadata, TokenizerError, Vocabulary, read_flag, read_string, refuse, warn

SPACE = "\u2581"


class SentencePieceBPE:
    """Encodes plain text to ids, and decodes ids to bytes. Text reaches it without special tokens."""

    add_bos = True  # the default if the file does not say

    def __init__(self, vocabulary: Vocabulary, metadata: Metadata):
        self._vocabulary = vocabulary
        self.add_space_prefix = read_flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        self._byte_values = _read_byte_tokens(vocabulary, metadata)
        self._byte_ids = {value: token_id for token_id, value in self._byte_values.items()}
        _refuse_normalisation(metadata)
        if (pre := read_string(metadata, "tokenizer.ggml.pre")) not in (None, "default"):
            warn(
                metadata,
                "tokenizer.ggml.pre",
                f"tokenizer.ggml.pre = {pre!r} is not used by SentencePiece vocabularies",
            )
        words = vocabulary.of_type(TokenType.NORMAL, TokenType.UNUSED)
        model = _model_file(vocabulary, words, vocabulary.scores(metadata))
        self._id_of_piece = [None, *words]  # sentencepiece's id -> id; 0 stands for text that no word covers
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            rule = "tokenizer.ggml.tokens, scores and token_type must make a SentencePiece model"
            refuse(metadata, "tokenizer.ggml.tokens", f"sentencepiece: {str(error).rstrip('.')}", rule)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, which holds no special tokens.

        Raises:
            TokenizerError: a character has no word and no byte tokens, and the vocabulary has no unknown token.
        """
        ids: list[int] = []
        pieces = self._processor.encode(text)
        spelled = self._processor.encode(text, out_type=str) if 0 in pieces else [""] * len(pieces)
        for piece, word in zip(pieces, spelled, strict=True):
            token_id = self._id_of_piece[piece]
            ids += self._fallback(word) if token_id is None else [token_id]
        return ids

    def _fallback(self, characters: str) -> list[int]:
        """The ids of each character's bytes. A run of characters without byte tokens becomes one unknown token."""
        ids: list[int] = []
        in_unknown = False
        for character in characters:
            bytes_ = [self._byte_ids.get(value) for value in character.encode()]
            known = [token_id for token_id in bytes_ if token_id is not None]
            if len(known) == len(bytes_):
                ids += known
            elif not in_unknown:
                ids.append(self._unknown(character))
            in_unknown = len(known) != len(bytes_)
        return ids

    def _unknown(self, character: str) -> int:
        if self._vocabulary.unk_id is None:
            raise TokenizerError(
                f"character {character.replace(SPACE, ' ')!r}",
                rule="this vocabulary has no word with it, no token for one of its bytes and no unknown token",
                remedy="Remove or replace the character",
            )
        return self._vocabulary.unk_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for."""
        byte = self._byte_values.get(token_id)
        if byte is not None:
            return bytes([byte])
        return self._vocabulary.tokens[token_id].replace(SPACE, " ").encode()


def _read_byte_tokens(vocabulary: Vocabulary, metadata: Metadata) -> dict[int, int]:
    """The id of each byte token -> its byte."""
    values, key = {}, "tokenizer.ggml.tokens"
    for token_id in vocabulary.of_type(TokenType.BYTE):
        token = vocabulary.tokens[token_id]
        if token not in BYTE_TOKENS:
            found = f"{key}[{token_id}] = {token!r}, typed as a byte"
            refuse(metadata, key, found, "byte tokens are spelled <0x00> to <0xFF>")
        values[token_id] = BYTE_TOKENS[token]
    if 0 < len(values) < 256:
        warn(
            metadata,
            key,
            f"{key} has {len(values)} byte tokens of 256: a character that takes another byte, and that no word "
            "covers, becomes the unknown token",
        )
    return values


def _refuse_normalisation(metadata: Metadata) -> None:
    charsmap = metadata.get(key := "tokenizer.ggml.precompiled_charsmap")
    if read_flag(metadata, "tokenizer.ggml.remove_extra_whitespaces", False) or (
        charsmap is not None and np.size(charsmap) > 0
    ):
        refuse(
            metadata,
            key,
            f"{key} or remove_extra_whitespaces is set",
            "text is encoded without normalisation, as in the Llama, Mistral and Phi-3 tokenizers",
            "Use a model of those families",
        )


def _model_file(vocabulary: Vocabulary, words: list[int], scores: np.ndarray) -> bytes:
    """A SentencePiece model file: BPE, normaliser "identity", an unknown piece, then ``words``.

    It holds only pieces that plain text can become: special tokens are cut out of the text before, and sentencepiece
    accepts byte tokens only if there are 256 of them.
    """
    unknown = "<unk>"
    while unknown in vocabulary.ids:
        unknown += "_"
    model = ModelProto()
    model.pieces.add(piece=unknown, score=0.0, type=TokenType.UNKNOWN)
    for token_id in words:
        kind = int(vocabulary.types[token_id])
        model.pieces.add(piece=vocabulary.tokens[token_id], score=float(scores[token_id]), type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.unk_piece = 0, unknown
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
