"""What a generation gives back: all at once, or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rooflama.models import Timings, TokenLogprob, TokenRun

from .text_stream import TextStream


@dataclass(frozen=True)
class Generation:
    """What came back for one prompt.

    Attributes:
        text: the new text, without the prompt and without the tokens that ended it.
        token_ids: every token drawn, the ending one included.
        finish_reason: ``stop`` (an end token or a stop string) or ``length`` (max_new_tokens, or a full context).
        timings: prompt tokens, seconds, steps.
        seed: what reproduces this sampled text, given alone.
        logprobs: one entry for each of ``token_ids``; None if not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    seed: int
    logprobs: list[TokenLogprob] | None = None

    def _repr_html_(self) -> str:
        from html import escape

        t = self.timings
        note = (
            f"{t.prompt_tokens} prompt tokens in {t.prefill_s:.2f} s, {len(self.token_ids)} new at "
            f"{t.decode_tokens_per_s:.1f} tokens/s, ended by {self.finish_reason}"
        )
        return f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre><small>{escape(note)}</small>"


class Stream:
    """Pieces of one generation's text, none of which ends inside a character.

    Attributes:
        timings, finish_reason, logprobs: as in Generation, final once the iteration has ended.
        seed: as in Generation.
    """

    def __init__(self, run: TokenRun, text: TextStream):
        self._run, self._text = run, text
        self.seed = run.requests[0].params.seed

    @property
    def timings(self) -> Timings:
        return self._run.timings[0]

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self._run.logprobs[0]

    @property
    def finish_reason(self) -> str:
        return self._text.finish_reason

    def __iter__(self) -> Iterator[str]:
        try:
            for number, token in self._run:
                piece = self._text.feed(token)
                if self._text.finished:
                    self._run.finish(number)
                if piece:
                    yield piece
        except GeneratorExit:  # abandoned
            self._run.close()
            raise
        if rest := self._text.flush():
            yield rest
