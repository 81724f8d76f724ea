"""Finding special tokens in text, before the rest is encoded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

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
