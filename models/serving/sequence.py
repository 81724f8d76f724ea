"""One request and its sequence: everything that is true of it, from its prompt to its last token."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rooflama.kernels import RooflamaError, current_swaps

from .sampling import SamplingParams, TokenLogprob


class NaNLogits(RooflamaError, ArithmeticError):
    """The logits hold a NaN."""


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of a sequence, from its first prefill pass on. Steps that it waits for are included.

    Attributes:
        prompt_tokens: of the prompt.
        cached_tokens: tokens of the prompt whose keys and values came from the prefix cache.
        prefill_s: until the first token was drawn.
        decode_steps, decode_s: tokens after the first, and the seconds that they took.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second of one sequence, its first token not counted."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, the most new tokens (None: until the context is full), and how they are drawn."""

    prompt: list[int]
    max_new_tokens: int | None
    params: SamplingParams

    def planned_tokens(self, max_context: int) -> int:
        """The most tokens that the sequence may reach, its prompt included."""
        return max_context if self.max_new_tokens is None else len(self.prompt) + self.max_new_tokens


class Status(enum.Enum):
    """Where a sequence is: outside an engine, waiting for pages, holding pages, or at its end."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """A request, and how far it has come. ``TokenEngine`` changes it; callers read it.

    Attributes:
        request: what was asked for.
        on_token: called with each token as it is drawn; True ends the sequence. It runs in whichever thread steps.
        swaps: the kernels that were swapped where the sequence was made. They hold in each of its passes.
        token_ids: the tokens drawn so far.
        logprobs: one entry per token drawn, if the request asks for them.
        finish_reason: ``stop`` (an end token or a stop string), ``length`` (max_new_tokens, or a full context),
            ``cancelled`` or ``error``; None before the end.
        error: what ended the sequence before its time; None if nothing did.
        preemptions: how often it gave up its pages and was computed again.
        number: its place in the order of arrival; -1 before it is added to an engine.
        most_new: the drawn tokens that end it; 0 before it is added to an engine.
        cache_id: of its pages in the cache; None without pages.
        num_cached: tokens whose keys and values are in the cache, those of a launched step included.
        limit: the most tokens that it has pages for and will need.
        row: its row among the decode slots; -1 while it has none.
        life: the number of times that it took pages; results of an earlier life are dropped.
        cached_tokens: of the prompt, see ``Timings``.
        began: when its first prefill pass was launched, a time of ``perf_counter``; 0 before.
        drawn_at: such a time for each token drawn.
    """

    request: Request
    on_token: Callable[[int], bool] | None = None
    swaps: Mapping[str, Callable[..., Any]] = field(default_factory=current_swaps)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    status: Status = Status.NEW
    finish_reason: str | None = None
    error: BaseException | None = None
    preemptions: int = 0
    number: int = -1
    most_new: int = 0
    cache_id: int | None = None
    num_cached: int = 0
    limit: int = 0
    row: int = -1
    life: int = 0
    cached_tokens: int = 0
    began: float = 0.0
    drawn_at: list[float] = field(default_factory=list)
    _packed: bytes = b""

    @property
    def timings(self) -> Timings:
        """What it took up to now."""
        first, last = (self.drawn_at[0], self.drawn_at[-1]) if self.drawn_at else (self.began, self.began)
        return Timings(
            len(self.request.prompt),
            self.cached_tokens,
            prefill_s=first - self.began,
            decode_steps=max(0, len(self.drawn_at) - 1),
            decode_s=last - first,
        )

    def packed(self, num_tokens: int) -> bytes:
        """Its first tokens, the prompt's and those drawn, as int32."""
        packed = len(self._packed) // 4
        if packed < num_tokens:
            known = max(0, packed - len(self.request.prompt))
            self._packed += array("i", [*self.request.prompt[packed:], *self.token_ids[known:]]).tobytes()
        return self._packed[: 4 * num_tokens]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.token_ids)

    @property
    def most_tokens(self) -> int:
        """The tokens that end it, its prompt's included."""
        return len(self.request.prompt) + self.most_new

    @property
    def reported_logprobs(self) -> list[TokenLogprob] | None:
        """``logprobs``; None if the request asks for none."""
        return None if self.request.params.logprobs is None else self.logprobs

    @property
    def has_ended(self) -> bool:
        return self.status is Status.ENDED
