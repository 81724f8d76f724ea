"""From prompts to tokens: admit what fits, prefill, then decode until every sequence has ended.

On a GPU the host reads each step's tokens one step late, so that the next step is already running; a step launched
after a sequence's last token computes something nobody reads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflama.kernels import RooflamaError

from .engine import DecodeBatch, Engine, SamplingParams
from .metadata import ConfigError


@dataclass
class Timings:
    """Wall-clock seconds of one sequence's group, the device's work included."""

    prompt_tokens: int
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first, for one sequence."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, how many may follow, and how they are drawn."""

    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams

    @property
    def planned_tokens(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    def check(self, engine: Engine) -> None:
        """Raise ConfigError if the prompt is empty, names unknown tokens, or the plan exceeds the context."""
        if not self.prompt:
            raise ConfigError(
                "an empty prompt",
                rule="generation continues at least one token",
                remedy="Give a prompt of one token or more",
            )
        vocab_size = engine.decoder.config.vocab_size
        unknown = [token for token in self.prompt if not 0 <= token < vocab_size]
        if unknown:
            raise ConfigError(
                f"token id {unknown[0]}",
                rule=f"the embedding has rows for ids 0 to {vocab_size - 1}",
                remedy="Encode the prompt with this model's own tokenizer, and leave out tokens that have no row",
            )
        if self.planned_tokens > engine.max_context:
            raise ConfigError(
                f"{len(self.prompt)} prompt tokens and {self.max_new_tokens} new ones",
                rule=f"together they must fit into the context of {engine.max_context} tokens",
                remedy="Shorten the prompt, ask for fewer tokens, or load the model with a larger max_context",
            )


class NaNLogits(RooflamaError, ArithmeticError):
    """A model computed no numbers."""


class Generation(Iterator[tuple[int, int]]):
    """An iterator of (request number, token id), over all requests. ``finish`` ends one early, ``close`` all.

    Requests run in groups, in order: as many at once as the page pool holds at their planned lengths.

    Args:
        engine: the model.
        requests: what to run; each prompt holds at least one token.
        end_ids: tokens that end a sequence; such a token is still reported.

    Raises:
        ConfigError: an empty prompt, an unknown token, or a plan beyond the context; while iterating, closed before.
        NaNLogits: while iterating; as with every error, no page is held afterwards.
        DeviceError: while iterating, when the device fails.
    """

    def __init__(self, engine: Engine, requests: list[Request], end_ids: Collection[int]):
        for request in requests:
            request.check(engine)
            if request.max_new_tokens < 1:
                raise ConfigError(
                    f"max_new_tokens {request.max_new_tokens}",
                    rule="at least one token is generated",
                    remedy="Ask for 1 or more",
                )
        self.engine, self.requests, self.end_ids = engine, requests, frozenset(end_ids)
        self.timings = [Timings(len(request.prompt)) for request in requests]
        self._open: set[int] = set()
        self._tokens: Generator[tuple[int, int]] | None = self._groups()

    def close(self) -> None:
        """Give all pages back and let go of the model; asking for another token is an error from here on."""
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
            del self.engine

    def finish(self, number: int) -> None:
        """End request ``number``: it yields no more tokens."""
        self._open.discard(number)

    def __next__(self) -> tuple[int, int]:
        if self._tokens is None:
            raise ConfigError(
                "a closed generation", rule="it ends with its model", remedy="Start another on a model that is open"
            )
        with torch.inference_mode(False):  # else what one token leaves behind could not be changed for the next
            return next(self._tokens)

    def _groups(self) -> Generator[tuple[int, int]]:
        waiting = deque(range(len(self.requests)))
        while waiting:
            group = [waiting.popleft()]
            free = self.engine.cache.pool.num_free - self._pages(group[0])
            while waiting and self._pages(waiting[0]) <= free:
                free -= self._pages(waiting[0])
                group.append(waiting.popleft())
            with self.engine.cache.device.guard("generation"):
                yield from self._run(group)

    def _pages(self, number: int) -> int:
        return self.engine.cache.pages_for(self.requests[number].planned_tokens)

    def _run(self, group: list[int]) -> Iterator[tuple[int, int]]:
        cache = self.engine.cache
        held: list[int] = []
        try:
            for number in group:
                held.append(cache.add())
                cache.reserve(held[-1], self.requests[number].planned_tokens)
            yield from self._decode(group, held)
        finally:
            for sequence_id in held:
                cache.free(sequence_id)

    def _decode(self, group: list[int], sequence_ids: list[int]) -> Iterator[tuple[int, int]]:
        engine = self.engine
        requests = [self.requests[number] for number in group]
        planned = [request.planned_tokens for request in requests]
        clock = time.perf_counter()

        last_hidden: list[Tensor] = [torch.empty(0)] * len(group)
        for chunk, hidden in engine.prefill(sequence_ids, [request.prompt for request in requests], planned):
            end = 0
            for span in chunk:
                end += span.num_tokens
                last_hidden[span.index] = hidden[end - 1].clone()  # a view would keep the whole chunk
            del hidden  # else the next chunk would be computed beside it
        batch = DecodeBatch(engine, sequence_ids, planned, planned, [request.params for request in requests])
        tokens = batch.draw(engine.decoder.logits(torch.stack(last_hidden)))

        self._open.update(group)
        emitted = dict.fromkeys(group, 0)
        in_flight = deque([_Readback(tokens)])
        steps_ahead = 0 if engine.device.type == "cpu" else 1
        while not self._open.isdisjoint(group):
            while len(in_flight) <= steps_ahead:
                in_flight.append(_Readback(batch.step()))
            values = in_flight.popleft().wait()
            now = time.perf_counter()
            seconds, clock = now - clock, now
            for row, number in enumerate(group):
                if number not in self._open:
                    continue
                if values[row] < 0:
                    raise NaNLogits(
                        f"a NaN among the logits of token {emitted[number] + 1} after a prompt of "
                        f"{self.timings[number].prompt_tokens}, activations in {engine.dtype}",
                        rule="logits are numbers",
                        remedy="rooflama check finds weights that are none; float16 overflows where bfloat16 does not",
                    )
                self._account(number, seconds, first=emitted[number] == 0)
                emitted[number] += 1
                yield number, values[row]
                if values[row] in self.end_ids or emitted[number] == self.requests[number].max_new_tokens:
                    self.finish(number)
                if number not in self._open:
                    batch.rest(row)

    def _account(self, number: int, seconds: float, *, first: bool) -> None:
        timing = self.timings[number]
        if first:
            timing.prefill_s = seconds
        else:
            timing.decode_steps += 1
            timing.decode_s += seconds


class _Readback:
    """Token ids on their way to the host."""

    def __init__(self, tokens: Tensor):
        self._event = None
        if tokens.device.type == "cpu":
            self._host = tokens.clone()
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
