"""SentencePiece vocabularies (`tokenizer.ggml.model` = "llama"): Llama 2, TinyLlama, Mistral, Phi-3.

The sentencepiece library itself does the merging: tokens, scores and types are written out as the model file they once
came from. Normalisation is none, as in all these models: spaces become U+2581 and nothing else changes, so that only
a text with U+2581 in it comes back different (with spaces). The space before a text is put there by the caller.
"""

from __future__ import annotations

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from .vocabulary import Metadata, TokenType, Vocabulary, read_flag, refuse

SPACE = "\u2581"
BYTE_TOKENS = {f"<0x{value:02X}>": value for value in range(256)}


class SentencePieceBPE:
    """Plain text to ids and ids to bytes. Special tokens are cut out of the text before it comes here."""

    add_bos = True  # where the file does not say

    def __init__(self, vocabulary: Vocabulary, metadata: Metadata):
        self._vocabulary = vocabulary
        self.add_space_prefix = read_flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        self._byte_values = _read_byte_tokens(vocabulary, metadata)
        _refuse_normalisation(metadata)
        model = _model_file(vocabulary, vocabulary.scores(metadata), byte_fallback=bool(self._byte_values))
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            rule = "tokenizer.ggml.tokens, scores and token_type must make a SentencePiece model"
            refuse(metadata, "tokenizer.ggml.tokens", f"sentencepiece: {str(error).rstrip('.')}", rule)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, which holds no special token."""
        return self._processor.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What one id stands for in the text."""
        byte = self._byte_values.get(token_id)
        if byte is not None:
            return bytes([byte])
        return self._vocabulary.tokens[token_id].replace(SPACE, " ").encode()


def _read_byte_tokens(vocabulary: Vocabulary, metadata: Metadata) -> dict[int, int]:
    """Id -> byte value of the byte tokens; there are none, or one for each byte."""
    values, key = {}, "tokenizer.ggml.tokens"
    for token_id in vocabulary.of_type(TokenType.BYTE):
        token = vocabulary.tokens[token_id]
        if token not in BYTE_TOKENS:
            found = f"{key}[{token_id}] = {token!r}, typed as a byte"
            refuse(metadata, key, found, "byte tokens are spelled <0x00> to <0xFF>")
        values[token_id] = BYTE_TOKENS[token]
    if values and len(values) != 256:
        refuse(metadata, key, f"the vocabulary has {len(values)} byte tokens", "there must be 256 or none")
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
            "text is encoded here as it is, which is what the Llama, Mistral and Phi-3 tokenizers do",
            "Use a model of those families",
        )


def _model_file(vocabulary: Vocabulary, scores: np.ndarray, *, byte_fallback: bool) -> bytes:
    """The SentencePiece model file with these pieces, BPE, normaliser "identity".

    User-defined tokens are written as control: they are cut out of the text before sentencepiece sees it.
    """
    types = np.where(vocabulary.types == TokenType.USER_DEFINED, TokenType.CONTROL, vocabulary.types)
    if vocabulary.unk_id is not None:  # sentencepiece needs exactly one
        types[vocabulary.unk_id] = TokenType.UNKNOWN
    model = ModelProto()
    for token, score, kind in zip(vocabulary.tokens, scores.tolist(), types.tolist(), strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = byte_fallback
    if vocabulary.unk_id is not None:
        trainer.unk_id, trainer.unk_piece = vocabulary.unk_id, vocabulary.tokens[vocabulary.unk_id]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
