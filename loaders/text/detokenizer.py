"""Ids back to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """What one id contributes to the text."""

    data: bytes
    special: bool  # ends generation, or is control, unknown or unused: left out by skip_special
    whole: bool  # matched whole in text, as special tokens are: no space prefix stands before it
    space_follows: bool  # text after it is encoded with a space before it, as SentencePiece does


class PieceTable(Protocol):
    add_space_prefix: bool

    def piece(self, token_id: int) -> Piece: ...


class StreamDecoder:
    """Decodes a stream of ids; the strings it returns, joined, are what decoding them all at once gives.

    Bytes that end in the middle of a character are held back until the rest arrives. Bytes that can be no UTF-8
    become U+FFFD. The space that SentencePiece's encoder puts before a text, and after each special token, is taken
    out again; ``after`` is the id that the stream continues from (the prompt's last), None at the start of a text.
    """

    def __init__(self, table: PieceTable, *, skip_special: bool, after: int | None = None):
        self._table = table
        self._skip_special = skip_special
        self._at_boundary = table.add_space_prefix if after is None else table.piece(after).space_follows
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly empty.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        data, special, whole, space_follows = self._table.piece(token_id)
        if self._at_boundary and not whole:
            data = data.removeprefix(b" ")
        self._at_boundary = space_follows
        if special and self._skip_special:
            return ""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD where the stream ended in the middle of a character, else nothing."""
        return self._decoder.decode(b"", final=True)
