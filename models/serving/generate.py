"""From prompts to tokens: admit what fits, prefill, then decode until every sequence has ended.

On a GPU the host reads each step's tokens one step late, so that the next step is already running; a step launched
after a sequence's last token computes something nobody reads.
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

GROWTH_TOKENS = 256  # for which a request without max_new_tokens takes pages at a time


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

    def add(self, seconds: float, *, first: bool) -> None:
        """One more token, the first of its sequence or not."""
        if first:
            self.prefill_s = seconds
        else:
            self.decode_steps += 1
            self.decode_s += seconds


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, how many may follow (None: as many as the context holds), and how they are drawn."""

    prompt: list[int]
    max_new_tokens: int | None
    params: SamplingParams

    def planned_tokens(self, max_context: int) -> int:
        return max_context if self.max_new_tokens is None else len(self.prompt) + self.max_new_tokens

    def check(self, runner: ModelRunner) -> None:
        """Raise ArgumentError if the prompt is empty, names unknown tokens, or the plan exceeds the context."""
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
                remedy="Encode the prompt with this model's own tokenizer, and leave out tokens that have no row",
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
    """A model computed no numbers."""


@dataclass
class _Task:
    """What is true of one request while it runs."""

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
    """Requests that decode together: the i-th is row i of the batch. Rows that were evicted are None."""

    numbers: list[int | None]
    batch: DecodeBatch
    lengths: list[int]  # tokens of each row in the cache when its first step begins
    limits: list[int]  # tokens each row has pages for
    in_flight: deque[_Readback]
    steps: int = 0  # launched


class TokenRun(Iterator[tuple[int, int]]):
    """An iterator of (request number, token id), over all requests. ``finish`` ends one early, ``close`` all.

    Requests run in groups, in order, as many at once as the page pool holds. A request with ``max_new_tokens`` has its
    pages from the beginning to the end. One without takes them ``GROWTH_TOKENS`` at a time; if none are free, it leaves
    its group, and a later group reads its text again and goes on. So does a run that other users of the model made give
    up its pages while nobody asked for its next token (``turns``).

    Args:
        runner: the model.
        requests: what to run; each prompt holds at least one token.
        end_ids: tokens that end a sequence; such a token is still reported.

    Attributes:
        timings: of each request.
        logprobs: of each request, one entry for each token reported; None if it did not ask.

    Raises:
        ArgumentError: an empty prompt, an unknown token, or a plan beyond the context.
        ModelClosed: while iterating, if the run was closed before.
        NaNLogits: while iterating; as with every error, no page is held afterwards.
        DeviceError: while iterating, when the device fails.
    """

    def __init__(self, runner: ModelRunner, requests: list[Request], end_ids: Collection[int]):
        for request in requests:
            request.check(runner)
            if request.max_new_tokens is not None and request.max_new_tokens < 1:
                raise ArgumentError(
                    f"max_new_tokens {request.max_new_tokens}",
                    rule="at least one token is generated",
                    remedy="Ask for 1 or more",
                )
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
        """Give all pages back and let go of the model; asking for another token is an error from here on."""
        with self._turns.turn():
            self._closed = True
            self._end()
            self.__dict__.pop("runner", None)

    def finish(self, number: int) -> None:
        """End request ``number``: it yields no more tokens."""
        self._tasks[number].is_open = False
        self._ready = deque(entry for entry in self._ready if entry[0] != number)

    def __next__(self) -> tuple[int, int]:
        self._turns.wake(self)
        try:
            with self._turns.turn(), swapped_only(self._swaps), torch.inference_mode(False):
                return self._next()  # not in inference mode: else a later token could not change what it leaves
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
        raise ModelClosed(
            "a closed generation", rule="it ends with its model", remedy="Start another on a model that is open"
        )

    def suspend(self) -> None:
        """Give all pages back; the next token asked for takes others and reads the text again."""
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
        """Tokens that a request which is about to run gets pages for."""
        task = self._tasks[number]
        planned = task.request.planned_tokens(self.runner.max_context)
        return planned if task.request.max_new_tokens is not None else min(planned, task.length + GROWTH_TOKENS)

    def _begin(self) -> None:
        """Start a group as soon as there are pages for its first request."""
        pool = self.runner.cache.pool
        needed = self.runner.cache.pages_for(self._limit(self._waiting[0]))
        self._turns.make_room(lambda: self._closed or pool.num_free >= needed)
        if not self._closed and self._group is None and self._waiting:  # as nobody else had a turn with this run
            with self.runner.cache.device.guard("generation"):
                self._start(self._admit())

    def _admit(self) -> list[int]:
        """The requests to run next, with their pages."""
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
        """Read the texts of a group, and draw the first token after each."""
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
                last_hidden[span.index] = hidden[end - 1].clone()  # a view would keep the whole chunk
            del hidden  # else the next chunk would be computed beside it
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
        """Launch the next step and take in the tokens of one that was launched before."""
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
        """Let finished rows rest, and see that the others have pages for one more step, or evict them."""
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
                    remedy="rooflama check finds weights that are none; float16 overflows where bfloat16 does not",
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
    """Token ids, and log probabilities if there are any, on their way to the host."""

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
