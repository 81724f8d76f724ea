"""The result of a generation, whole or as a stream of pieces; and the way from tokens to text."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import compress
from math import exp
from typing import Any

from rooflama.kernels.facts import PALETTE, Html, element, tint
from rooflama.loaders.text.tokenizer import Tokenizer
from rooflama.models import Sequence, Timings, TokenEngine, TokenLogprob
from rooflama.models.memory.amounts import count


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Attributes:
        text: the new text, without the prompt and without the tokens that ended it.
        token_ids: every token drawn, the one that ended the text included.
        finish_reason: ``stop`` (an end token or a stop string) or ``length`` (max_new_tokens, or a full context).
        timings: prompt tokens, seconds and steps.
        seed: reproduces this text in a call of its own.
        logprobs: one entry per token id; None if the request asks for none. Displays colour each token by them.
        tokenizer: the model's, for displays of single tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    seed: int
    logprobs: list[TokenLogprob] | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    @property
    def note(self) -> str:
        """What it took, in words."""
        t = self.timings
        return (
            f"{count(t.prompt_tokens, 'prompt token')} in {t.prefill_s:.2f} s, {len(self.token_ids)} new at "
            f"{t.decode_tokens_per_s:.1f} tokens/s, ended by {self.finish_reason}"
        )

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        if self.logprobs is None or self.tokenizer is None:
            yield Text(self.text)
        else:
            styles = ("bold red", "red", "yellow", "")  # the likelier, the plainer
            drawn = ((self._text_of(one.token_id), styles[int(3.99 * exp(one.logprob))]) for one in self.logprobs)
            yield Text.assemble(*drawn)
        yield Text(self.note, style="dim")

    def _repr_html_(self) -> str:
        if self.logprobs is None or self.tokenizer is None:
            shown = [Html(element("span", self.text))]
        else:
            shown = [self._coloured(one) for one in self.logprobs]
        return element("div", *shown, style="white-space:pre-wrap;font-family:monospace") + element("small", self.note)

    def _coloured(self, one: TokenLogprob) -> Html:
        """A token, the darker the likelier, with its alternatives as the text of the pointer."""
        lines = [f"{exp(score):6.1%}  {self._text_of(token)!r}" for token, score in one.top]
        title = "\n".join([f"{exp(one.logprob):.1%} {self._text_of(one.token_id)!r}", *lines])
        return element("span", self._text_of(one.token_id), style=tint(PALETTE[0], exp(one.logprob)), title=title)

    def _text_of(self, token_id: int) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.piece(token_id).data.decode("utf-8", "replace")


def generation(sequence: Sequence, text: TextStream) -> Generation:
    """The result of a sequence that has ended."""
    return Generation(
        "".join(text.pieces) + text.flush(),
        sequence.token_ids,
        text.finish_reason,
        sequence.timings,
        sequence.request.params.seed,
        sequence.reported_logprobs,
        text.tokenizer,
    )


class Stream:
    """The text of one generation, in pieces as it is produced. No piece ends inside a character.

    Iterate with ``for`` or with ``async for``. The generation begins with the first piece that is asked for. From then
    on it advances in each step of the engine, whoever waits for that step.

    Attributes:
        timings, finish_reason, logprobs: as in Generation, final once the iteration has ended.
        seed: as in Generation.
    """

    def __init__(self, engine: TokenEngine, sequence: Sequence, text: TextStream):
        self._engine, self._sequence, self._text = engine, sequence, text
        self._begun = self._closed = False
        self.seed = sequence.request.params.seed

    @property
    def timings(self) -> Timings:
        return self._sequence.timings

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self._sequence.reported_logprobs

    @property
    def finish_reason(self) -> str:
        return self._text.finish_reason

    def close(self) -> None:
        """End the generation and give its pages back; iterating ends. May be called again, and from another thread."""
        self._closed = True
        self._engine.cancel(self._sequence)

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._next()) is not None:
                yield piece
        except GeneratorExit:  # abandoned
            self._engine.cancel(self._sequence)
            raise

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while (piece := await asyncio.to_thread(self._next)) is not None:
                yield piece
        except (GeneratorExit, asyncio.CancelledError):
            self._engine.cancel(self._sequence)
            raise

    def _next(self) -> str | None:
        """The next piece, once there is one; None at the end."""
        if self._closed:
            return None
        if not self._begun:
            self._begun = True
            self._engine.add(self._sequence)
        self._engine.advance(self._sequence, until=lambda: bool(self._text.pieces))
        if self._closed:
            return None
        if self._text.pieces:
            return self._text.pieces.popleft()
        self._closed = True
        return self._text.flush() or None


class TextStream:
    """Turns tokens into text, and holds back text that may be the beginning of a stop string.

    Stop strings are also found in the text of tokens that are not shown, such as ``<|im_end|>``.

    Args:
        tokenizer: the model's.
        stops: strings that end the text; none is empty.
        after: the prompt's last token, which decides whether a space at the beginning is shown.

    Attributes:
        pieces: text that ``write`` has completed.
        finished: whether an end token or a stop string was found.
        finish_reason: ``stop`` if finished, else ``length``.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], *, after: int | None = None):
        self.tokenizer = tokenizer
        self._decode = tokenizer.stream(skip_special=True, after=after)
        self._stops = stops
        self._held = ""
        self._is_shown: list[bool] = []  # of each character held
        self.pieces: deque[str] = deque()
        self.finished = False

    @property
    def finish_reason(self) -> str:
        return "stop" if self.finished else "length"

    def write(self, token: int) -> bool:
        """Add the text that this token completes to ``pieces``. Returns whether the text is finished."""
        if piece := self.feed(token):
            self.pieces.append(piece)
        return self.finished

    def feed(self, token: int) -> str:
        """The text that this token completes; empty once finished."""
        if self.finished:
            return ""
        if not self._stops:  # then nothing is ever held
            self.finished = token in self.tokenizer.eos_ids
            return self._decode.feed(token)
        piece = self.tokenizer.piece(token)
        shown = self._decode.feed(token)  # nothing for a special token
        self._hold(piece.data.decode("utf-8", "replace") if piece.special else shown, is_shown=not piece.special)
        text = self._release()
        self.finished |= token in self.tokenizer.eos_ids
        return text

    def flush(self) -> str:
        """The text held back. Call it after the last token."""
        text = ""
        if not self.finished:
            self._hold(self._decode.flush(), is_shown=True)
            text = self._release()
        return text + self._take(len(self._held))

    def _hold(self, text: str, *, is_shown: bool) -> None:
        self._held += text
        self._is_shown += [is_shown] * len(text)

    def _release(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finished = True
            text = self._take(min(found))
            self._held, self._is_shown = "", []
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - keep)

    def _take(self, count: int) -> str:
        """Remove the first ``count`` characters held, and return those that are shown."""
        text = "".join(compress(self._held[:count], self._is_shown))
        self._held, self._is_shown = self._held[count:], self._is_shown[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of ``stop`` that ends ``text``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
