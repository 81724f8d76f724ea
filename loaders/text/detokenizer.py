"""Decoding a stream of ids to text, in whole characters."""

from __future__ import annotations

import codecs
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """The contribution of one id to the text."""

    data: bytes
    special: bool  # ends generation, or is a control, unknown or unused token; skip_special leaves it out
    unprefixed: bool  # never starts with the space that is added before a text
    space_follows: bool  # text after it is encoded with a space before it, as in SentencePiece


class PieceTable(Protocol):
    add_space_prefix: bool

    def piece(self, token_id: int) -> Piece: ...


class StreamDecoder:
    """Decodes a stream of ids. The strings that it returns, joined, equal the text of all ids decoded at once.

    Bytes of an incomplete character are held back until the rest arrives; bytes that are not UTF-8 become U+FFFD. The
    space that SentencePiece's encoder adds before a text and after a special token is removed. ``after`` is the id
    before the stream, usually the prompt's last; None at the start of a text.
    """

    def __init__(self, table: PieceTable, *, skip_special: bool, after: int | None = None):
        self._table = table
        self._skip_special = skip_special
        self._at_boundary = table.add_space_prefix if after is None else table.piece(after).space_follows
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes; it may be empty.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        data, special, unprefixed, space_follows = self._table.piece(token_id)
        if self._at_boundary and not unprefixed:
            data = data.removeprefix(b" ")
        self._at_boundary = space_follows
        if special and self._skip_special:
            return ""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD if the stream ended within a character, else an empty string."""
        return self._decoder.decode(b"", final=True)
