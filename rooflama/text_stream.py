"""Tokens to text as they come, up to an end token or a stop string."""

from __future__ import annotations

from rooflama.loaders.tokenizer import Tokenizer


class TextStream:
    """Feeds tokens through the detokeniser and holds back text that may be the beginning of a stop string.

    Args:
        tokenizer: the model's.
        stops: strings that end the text.
        after: the prompt's last token, which decides whether a first space is text.

    Attributes:
        finished: an end token or a stop string was seen.
        finish_reason: ``stop`` once finished, ``length`` until then.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], *, after: int | None = None):
        self._end_ids = tokenizer.eos_ids
        self._decode = tokenizer.stream(skip_special=True, after=after)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.finished = False

    @property
    def finish_reason(self) -> str:
        return "stop" if self.finished else "length"

    def feed(self, token: int) -> str:
        """The text that is certain after this token; empty once finished."""
        if self.finished:
            return ""
        if token in self._end_ids:
            self.finished = True
            return ""
        return self._release(self._decode.feed(token))

    def flush(self) -> str:
        """What was held back, once no token follows."""
        text = self._release("" if self.finished else self._decode.flush())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.finished, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
