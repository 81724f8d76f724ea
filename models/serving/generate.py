"""From prompts to tokens: admit the requests that fit, prefill, then decode until every sequence has ended.

On a GPU the host reads the tokens of a step while the next step runs. So one step more than needed is launched after a
sequence's last token; its result is not read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rooflama.kernels import RooflamaError, current_swaps, swapped_only

from ..errors import ArgumentError, ModelClosed
from .runner import DecodeBatch, ModelRunner
from .sampling import SamplingParams, TokenLogprob

GROWTH_TOKENS = 256  # a request without max_new_tokens takes pages for so many tokens at a time


@dataclass
class Timings:
    """Wall-clock seconds of the group in which a sequence ran, the device's work included."""

    prompt_tokens: int
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second of one sequence, its first token not counted."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    def add(self, seconds: float, *, first: bool) -> None:
        """Count one token, which may be the first of its sequence."""
        if first:
            self.prefill_s = seconds
        else:
            self.decode_steps += 1
            self.decode_s += seconds


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, the most new tokens (None: until the context is full), and how they are drawn."""

    prompt: list[int]
    max_new_tokens: int | None
    params: SamplingParams

    def planned_tokens(self, max_context: int) -> int:
        return max_context if self.max_new_tokens is None else len(self.prompt) + self.max_new_tokens

    def check(self, runner: ModelRunner) -> None:
        """Raise ArgumentError if the prompt is empty or has unknown tokens, or if the context is too short."""
        if not self.prompt:
            raise ArgumentError(
                "an empty prompt",
                rule="generation continues at least one token",
                remedy="Give a prompt of one token or more",
            )
        vocab_size = runner.decoder.config.vocab_size
        unknown = [token for token in self.prompt if not 0 <= token < vocab_size]
        if unknown:
            raise ArgumentError(
                f"token id {unknown[0]}",
                rule=f"the embedding has rows for ids 0 to {vocab_size - 1}",
                remedy="Encode the prompt with this model's own tokenizer, and leave out tokens without a row",
            )
        self.params.check(vocab_size if runner.num_tokens is None else runner.num_tokens)
        if self.max_new_tokens is None and len(self.prompt) >= runner.max_context:
            raise ArgumentError(
                f"{len(self.prompt)} prompt tokens",
                rule=f"at least one more token must fit into the context of {runner.max_context} tokens",
                remedy="Shorten the prompt, or load the model with a larger max_context",
            )
        if self.planned_tokens(runner.max_context) > runner.max_context:
            raise ArgumentError(
                f"{len(self.prompt)} prompt tokens and {self.max_new_tokens} new ones",
                rule=f"together they must fit into the context of {runner.max_context} tokens",
                remedy="Shorten the prompt, ask for fewer tokens, or load the model with a larger max_context",
            )


class NaNLogits(RooflamaError, ArithmeticError):
    """The logits hold a NaN."""


@dataclass
class _Task:
    """The state of one request."""

    request: Request
    timings: Timings
    drawn: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    is_open: bool = True

    @property
    def text(self) -> list[int]:
        return self.request.prompt + self.drawn

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.drawn)


@dataclass
class _Group:
    """Requests that decode together: ``numbers[i]`` is row i of the batch, None if it was stopped or evicted."""

    numbers: list[int | None]
    batch: DecodeBatch
    lengths: list[int]  # tokens of each row in the cache before the first step
    limits: list[int]  # tokens that each row has pages for
    in_flight: deque[_Readback]
    steps: int = 0  # launched


class TokenRun(Iterator[tuple[int, int]]):
    """An iterator of (request number, token id) over all requests. ``finish`` ends one request, ``close`` all of them.

    Requests run in order, in groups of as many as the page pool holds. A request with ``max_new_tokens`` takes all of
    its pages when it starts. One without takes pages for ``GROWTH_TOKENS`` tokens at a time; if too few are free, it
    leaves its group, and a later group reads its text again and continues it. A run that was suspended while idle
    (see ``turns``) continues in the same way.

    Args:
        runner: the model.
        requests: the requests; a request's number is its index.
        end_ids: tokens that end a sequence; the iterator still yields them.

    Attributes:
        timings: of each request.
        logprobs: of each request, one entry per token yielded; None if the request asks for none.

    Raises:
        ArgumentError: an empty prompt, an unknown token, or a plan beyond the context.
        ModelClosed: while iterating, if the run was closed before.
        NaNLogits: while iterating. After any error, the run holds no page.
        DeviceError: while iterating, if the device fails.
    """

    def __init__(self, runner: ModelRunner, requests: list[Request], end_ids: Collection[int]):
        for request in requests:
            request.check(runner)
        self.runner, self.end_ids = runner, frozenset(end_ids)
        self.requests, self._turns = requests, runner.turns
        self._swaps = current_swaps()
        self._tasks = [_Task(request, Timings(len(request.prompt))) for request in requests]
        self.timings = [task.timings for task in self._tasks]
        self.logprobs = [None if task.request.params.logprobs is None else task.logprobs for task in self._tasks]
        self._waiting = deque(range(len(requests)))
        self._ready: deque[tuple[int, int]] = deque()
        self._group: _Group | None = None
        self._held: dict[int, int] = {}  # request number -> its sequence in the cache
        self._clock = 0.0
        self._closed = False

    def close(self) -> None:
        """Give all pages back and release the model. Asking for another token raises ModelClosed."""
        with self._turns.turn():
            self._closed = True
            self._end()
            self.__dict__.pop("runner", None)

    def finish(self, number: int) -> None:
        """End request ``number``; it yields no more tokens."""
        self._tasks[number].is_open = False
        self._ready = deque(entry for entry in self._ready if entry[0] != number)

    def __next__(self) -> tuple[int, int]:
        self._turns.wake(self)
        try:
            with self._turns.turn(), swapped_only(self._swaps), torch.inference_mode(False):
                return self._next()  # outside inference mode, since later tokens change the tensors made here
        except StopIteration:
            raise
        except BaseException:
            with self._turns.turn():
                self._end()
            raise
        finally:
            self._turns.rest(self)

    def _next(self) -> tuple[int, int]:
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            if self._group is not None:
                with self.runner.cache.device.guard("generation"):
                    self._advance(self._group)
            elif self._waiting:
                self._begin()
            else:
                raise StopIteration
        raise ModelClosed("a closed generation", rule="it ends with its model", remedy="Start another on an open model")

    def suspend(self) -> None:
        """Give all pages back. The next token takes pages anew, and reads the text again."""
        if self._group is not None:
            live = [number for number in self._group.numbers if number is not None and self._tasks[number].is_open]
            self._waiting.extendleft(reversed(live))
        self._release()

    def _end(self) -> None:
        self._waiting.clear()
        self._ready.clear()
        self._release()

    def _release(self) -> None:
        self._group = None
        while self._held:
            self.runner.cache.free(self._held.popitem()[1])
        self._turns.drop(self)

    def _limit(self, number: int) -> int:
        """The number of tokens for which a request gets pages when it starts."""
        task = self._tasks[number]
        planned = task.request.planned_tokens(self.runner.max_context)
        return planned if task.request.max_new_tokens is not None else min(planned, task.length + GROWTH_TOKENS)

    def _begin(self) -> None:
        """Start a group once there are pages for its first request."""
        pool = self.runner.cache.pool
        needed = self.runner.cache.pages_for(self._limit(self._waiting[0]))
        self._turns.make_room(lambda: self._closed or pool.num_free >= needed)
        if not self._closed and self._group is None and self._waiting:  # unless another thread did it
            with self.runner.cache.device.guard("generation"):
                self._start(self._admit())

    def _admit(self) -> list[int]:
        """Take waiting requests into a group while there are pages for them, and reserve those pages."""
        cache = self.runner.cache
        group: list[int] = []
        self._turns.hold(self)
        while self._waiting:
            limit = self._limit(self._waiting[0])
            if group and cache.pages_for(limit) > cache.pool.num_free:
                break
            group.append(self._waiting.popleft())
            self._held[group[-1]] = cache.add()
            cache.reserve(self._held[group[-1]], limit)
        return group

    def _start(self, group: list[int]) -> None:
        """Prefill the texts of a group, and draw the first token after each."""
        runner, tasks = self.runner, [self._tasks[number] for number in group]
        sequence_ids = [self._held[number] for number in group]
        planned = [task.request.planned_tokens(runner.max_context) for task in tasks]
        limits = [self._limit(number) for number in group]
        self._clock = time.perf_counter()
        last_hidden: list[Tensor] = [torch.empty(0)] * len(group)
        for chunk, hidden in runner.prefill(sequence_ids, [task.text for task in tasks], planned):
            end = 0
            for span in chunk:
                end += span.num_tokens
                last_hidden[span.index] = hidden[end - 1].clone()  # a view would keep the chunk in memory
            del hidden  # before the next chunk is computed
        batch = DecodeBatch(
            runner,
            sequence_ids,
            limits,
            planned,
            [task.request.params for task in tasks],
            [task.request.prompt for task in tasks],
            [task.drawn for task in tasks],
        )
        tokens = batch.draw(runner.decoder.logits(torch.stack(last_hidden)))
        first = _Readback(tokens, batch.sampler.logprobs)
        self._group = _Group([*group], batch, [task.length for task in tasks], limits, deque([first]))

    def _advance(self, group: _Group) -> None:
        """Launch the next step, and read the tokens of one that was launched before."""
        steps_ahead = 0 if self.runner.device.type == "cpu" else 1
        while len(group.in_flight) <= steps_ahead:
            self._reserve(group)
            if not any(number is not None for number in group.numbers):
                break
            group.in_flight.append(_Readback(group.batch.step(), group.batch.sampler.logprobs))
            group.steps += 1
        if group.in_flight:
            self._take_in(group, group.in_flight.popleft())
        if not any(number is not None and self._tasks[number].is_open for number in group.numbers):
            self._release()

    def _reserve(self, group: _Group) -> None:
        """Stop finished rows. Give the others pages for one more step, or evict those for which none are free."""
        cache = self.runner.cache
        for row, number in enumerate(group.numbers):
            if number is None:
                continue
            task = self._tasks[number]
            if not task.is_open:
                group.numbers[row] = None
                group.batch.rest(row)
                continue
            limit = min(group.limits[row] + GROWTH_TOKENS, task.request.planned_tokens(self.runner.max_context))
            if group.lengths[row] + group.steps < group.limits[row] or limit == group.limits[row]:
                continue
            missing = cache.pages_for(limit) - cache.pages_for(group.limits[row])
            while cache.pool.num_free < missing and self._turns.suspend_idle():
                pass
            if cache.pool.num_free >= missing:
                cache.reserve(self._held[number], limit)
                group.batch.extend(row, self._held[number], limit)
                group.limits[row] = limit
            else:
                group.numbers[row] = None
                group.batch.rest(row)
                cache.free(self._held.pop(number))
                self._waiting.appendleft(number)

    def _take_in(self, group: _Group, step: _Readback) -> None:
        values, logprobs = step.wait()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        for row, number in enumerate(group.numbers):
            if number is None or not (task := self._tasks[number]).is_open:
                continue
            if values[row] < 0:
                raise NaNLogits(
                    f"a NaN among the logits of token {len(task.drawn) + 1} after a prompt of "
                    f"{task.timings.prompt_tokens}, activations in {self.runner.dtype}",
                    rule="logits are numbers",
                    remedy="rooflama check finds weights that are NaN; float16 overflows where bfloat16 does not",
                )
            task.timings.add(seconds, first=not task.drawn)
            task.drawn.append(values[row])
            if (likeliest := task.request.params.logprobs) is not None:
                drawn, ids, top = (column[row] for column in logprobs)
                pairs = list(zip(ids, top, strict=True))[:likeliest]
                task.logprobs.append(TokenLogprob(values[row], drawn, pairs))
            self._ready.append((number, values[row]))
            if values[row] in self.end_ids or task.length == task.request.planned_tokens(self.runner.max_context):
                task.is_open = False


class _Readback:
    """A copy to the host of a step's token ids, and of its log probabilities if there are any."""

    def __init__(self, tokens: Tensor, logprobs: tuple[Tensor, ...] | None):
        tensors = (tokens, *(logprobs or ()))
        self._event = None
        if tokens.device.type == "cpu":
            self._host = [tensor.clone() for tensor in tensors]
            return
        self._host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> tuple[list[int], list[list]]:
        if self._event is not None:
            self._event.synchronize()
        tokens, *logprobs = (host.tolist() for host in self._host)
        return tokens, logprobs
