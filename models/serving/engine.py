"""Many sequences on one model, each served as if it were alone.

A step lets every sequence that decodes draw a token, and runs one prefill pass over the next tokens of sequences that
have not begun. Sequences may be added and cancelled between any two steps, by any thread.

On a GPU a step's tokens are read while the next step runs, so that the device never waits for the host. A sequence that
an end token has ended is therefore computed for one more step, whose result is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from rooflama.kernels import swapped_only

from ..errors import ModelClosed
from .prefix_cache import PrefixCache
from .runner import DecodeSlots, ModelRunner
from .sampler import Readback, Readbacks
from .sampling import TokenLogprob
from .scheduler import Batch, Scheduler
from .sequence import NaNLogits, Sequence, Status
from .turns import Turns

MOST_SLOTS = 64  # sequences that hold pages at once, where nothing else is asked for


class TokenEngine:
    """Runs sequences of token ids. Every method may be called by any thread.

    Args:
        runner: the model.
        end_ids: tokens that end a sequence.
        num_slots: the most sequences that hold pages at once.
        token_budget: the most tokens of a step; None for as many as a prefill pass takes.
        prefix_cache: whether sequences share the pages of equal beginnings.

    Attributes:
        turns: who computes. A caller that uses the runner's cache itself holds a turn.
    """

    def __init__(
        self,
        runner: ModelRunner,
        end_ids: Collection[int] = (),
        *,
        num_slots: int = MOST_SLOTS,
        token_budget: int | None = None,
        prefix_cache: bool = True,
    ):
        self.runner, self.end_ids, self.num_slots = runner, frozenset(end_ids), num_slots
        self.turns = Turns()
        self.scheduler = Scheduler(
            runner.cache,
            num_slots=num_slots,
            token_budget=min(token_budget or runner.prefill_chunk, runner.prefill_chunk),
            prefixes=PrefixCache(runner) if prefix_cache else None,
            leave=self._leave,
        )
        self._groups: list[DecodeSlots] = []  # one for each set of swapped kernels
        self._readbacks, self._in_flight = Readbacks(), deque[Readback]()
        self._reads_late = runner.device.type != "cpu"  # a step's tokens while the next one runs
        self._arrivals = 0
        self._closed = False

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence take part.

        Raises:
            ArgumentError: an empty prompt, an unknown token, or a plan beyond the context.
            ModelClosed: the engine is closed.
        """
        with self.turns.turn():
            self.check_open()
            self.runner.check(sequence.request)
            sequence.number = self._arrivals
            planned = sequence.request.planned_tokens(self.runner.max_context)
            sequence.most_new = planned - len(sequence.request.prompt)
            self._arrivals += 1
            self.scheduler.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Nothing happens to one that has ended."""
        with self.turns.turn():
            self._end(sequence, "cancelled")

    def forget_prefixes(self) -> None:
        """Let no new sequence begin with pages that are known now."""
        with self.turns.turn():
            self.check_open()
            if self.scheduler.prefixes is not None:
                self.scheduler.prefixes.forget()

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[tuple[Sequence, int]]:
        """Compute one step. Returns the tokens that were drawn: none while prompts are read.

        A failure ends the newest of the sequences that were computed together, with its error. The others are computed
        again in later steps.

        Raises:
            ModelClosed: the engine is closed.
        """
        with self.turns.turn(), _outside_inference_mode():
            self.check_open()
            try:
                return self._step()
            except BaseException:  # an interrupt may have struck anywhere
                self._groups.clear()
                self._in_flight.clear()
                for sequence in list(self.scheduler.running):
                    sequence.row = -1
                    self.scheduler.preempt(sequence)
                raise

    def _step(self) -> list[tuple[Sequence, int]]:
        batch = self.scheduler.schedule()
        for sequence, error in batch.failed:
            self._end(sequence, error)
        launched = len(self._in_flight)
        for group in list(self._groups):
            self._together(group.sequences, partial(self._decode, batch, group))
        if batch.prefill:
            self._together([sequence for sequence, _ in batch.prefill], partial(self._prefill, batch))
        return self._take_in(len(self._in_flight) - launched if self._reads_late else 0)

    def advance(self, sequence: Sequence, until: Callable[[], bool]) -> None:
        """Step until ``until()`` holds or the sequence has ended. Raises what ended it before its time."""
        while True:
            with self.turns.turn():
                if until():
                    return
                if sequence.error is not None:
                    raise sequence.error
                if sequence.has_ended:
                    return
                self.step()

    @contextmanager
    def pages_for(self, num_tokens: int) -> Iterator[int]:
        """A sequence of the cache for work outside the engine, which waits meanwhile: its id.

        Sequences are preempted until there are pages for ``num_tokens`` tokens.
        """
        with self.turns.turn():
            self.check_open()
            cache = self.runner.cache
            self.scheduler.make_room(cache.pages_for(num_tokens))
            sequence_id = cache.add()
            try:
                yield sequence_id
            finally:
                cache.free(sequence_id)

    def close(self) -> None:
        """End every sequence with ModelClosed, and release the model."""
        self._closed = True
        with self.turns.turn():
            for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
                self._end(sequence, _closed_engine())
            self._groups.clear()
            self._in_flight.clear()
            self.__dict__.pop("runner", None)
            self.scheduler.close()

    def check_open(self) -> None:
        """Raise ModelClosed if the engine is closed."""
        if self._closed:
            raise _closed_engine()

    def _together(self, sequences: list[Sequence], compute: Callable[[], None]) -> None:
        """Run a pass over some sequences, under the swaps that they share."""
        if not sequences:
            return
        computed = list(sequences)
        try:
            with self.runner.cache.device.guard("generation"), swapped_only(computed[0].swaps):
                compute()
        except Exception as error:
            self._fail(computed, error)

    def _fail(self, computed: list[Sequence], error: Exception) -> None:
        """End the newest of the sequences that were computed together. The others are computed again."""
        if not computed:
            return
        newest = max(computed, key=lambda sequence: sequence.number)
        for sequence in computed:
            if sequence is not newest and sequence.cache_id is not None:
                self.scheduler.preempt(sequence)
        self._end(newest, error)

    def _decode(self, batch: Batch, group: DecodeSlots) -> None:
        """Launch a decode step of a group."""
        if extended := [one for one in batch.extended if one in group.sequences[one.row : one.row + 1]]:
            group.extend(extended)
        if any(sequence.num_cached < sequence.limit for sequence in group.sequences):
            self._in_flight.append(self._readbacks.start(group.sequences, *group.step()))
            for sequence in group.sequences:
                if sequence.num_cached < sequence.limit:
                    sequence.num_cached += 1

    def _prefill(self, batch: Batch) -> None:
        """Launch a prefill pass, and draw the first token of each sequence whose text it completes."""
        sequences = [sequence for sequence, _ in batch.prefill]
        now = time.perf_counter()
        parts, ends, end = [], [], 0
        for sequence, count in batch.prefill:
            sequence.began = sequence.began or now
            parts.append(_text(sequence)[sequence.num_cached : sequence.num_cached + count])
            end += count
            ends.append(end)
        ids = [sequence.cache_id for sequence in sequences if sequence.cache_id is not None]
        planned = [sequence.most_tokens for sequence in sequences]
        ((_, hidden),) = self.runner.prefill(ids, parts, planned)
        rows: list[Tensor] = []
        complete: list[Sequence] = []
        for (sequence, count), end in zip(batch.prefill, ends, strict=True):
            sequence.num_cached += count
            if self.scheduler.prefixes is not None:
                self.scheduler.prefixes.insert(sequence)
            if sequence.num_cached == sequence.num_tokens:
                complete.append(sequence)
                rows.append(hidden[end - 1])
        if complete:
            self._begin(complete, self.runner.decoder.logits(torch.stack(rows)))

    def _begin(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Give sequences slots, and draw the token after their texts."""
        group = self._group_of(sequences[0])
        for sequence in sequences:
            group.join(sequence, sequence.limit)
        self._in_flight.append(self._readbacks.start(sequences, *group.draw_first(logits, sequences)))

    def _group_of(self, sequence: Sequence) -> DecodeSlots:
        """The slots of sequences with the same swapped kernels, which captured steps hold as well."""
        for group in self._groups:
            if group.swaps == sequence.swaps:
                return group
        self._groups.append(DecodeSlots(self.runner, self.num_slots, sequence.swaps))
        return self._groups[-1]

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its row. A group of swapped kernels goes with its last sequence."""
        if sequence.row < 0:
            return
        group = self._group_of(sequence)
        try:
            with self.runner.cache.device.guard("generation"):
                group.leave(sequence)
        except Exception as error:  # what the rows hold is unknown
            self._groups.remove(group)
            for other in group.sequences:
                other.row = -1
            self._fail(group.sequences, error)
        else:
            if not group.sequences and group.swaps:
                self._groups.remove(group)

    def _take_in(self, ahead: int) -> list[tuple[Sequence, int]]:
        """Hand out the tokens of all steps but the last ``ahead`` launches."""
        taken: list[tuple[Sequence, int]] = []
        while len(self._in_flight) > ahead:
            readback = self._in_flight.popleft()
            try:
                with self.runner.cache.device.guard("generation"):
                    values, logprobs = readback.wait()
            except Exception as error:
                self._fail(readback.present, error)
                continue
            self._hand_out(readback, values, logprobs, taken)
        return taken

    def _hand_out(
        self, readback: Readback, tokens: list[int], logprobs: list[list], taken: list[tuple[Sequence, int]]
    ) -> None:
        """Append tokens to their sequences, and end each sequence whose last one it was."""
        now = time.perf_counter()
        reports = zip(*logprobs, strict=True) if logprobs else repeat(())
        rows = zip(readback.sequences, readback.lives, tokens, reports, strict=False)  # idle rows belong to none
        for sequence, life, token, report in rows:
            if sequence.life != life:
                continue
            if token < 0:
                self._end(sequence, _not_a_number(sequence, self.runner.dtype))
                continue
            drawn = sequence.token_ids
            drawn.append(token)
            sequence.drawn_at.append(now)
            taken.append((sequence, token))
            if report:
                _report(sequence, token, *report)
            if sequence.on_token is not None or token in self.end_ids or len(drawn) == sequence.most_new:
                self._end_if_done(sequence, token)

    def _end_if_done(self, sequence: Sequence, token: int) -> None:
        """Tell a sequence's owner of its newest token, and end the sequence if that was the last."""
        try:
            stopped = sequence.on_token is not None and sequence.on_token(token)
        except Exception as error:
            self._end(sequence, error)
            return
        if stopped or token in self.end_ids:
            self._end(sequence, "stop")
        elif len(sequence.token_ids) == sequence.most_new:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str | BaseException) -> None:
        """End a sequence, unless it has ended, with a finish reason or an error."""
        if not sequence.has_ended:
            sequence.status = Status.ENDED
            if isinstance(reason, str):
                sequence.finish_reason = reason
            else:
                sequence.finish_reason, sequence.error = "error", reason
            self.scheduler.release(sequence)


def _outside_inference_mode() -> AbstractContextManager:
    """A block whose tensors may be changed by later steps, whatever mode those run in."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _text(sequence: Sequence) -> list[int]:
    """All tokens of a sequence, the prompt's and those drawn."""
    return sequence.request.prompt + sequence.token_ids


def _report(sequence: Sequence, token: int, drawn: float, ids: list[int], top: list[float]) -> None:
    """Note the log probabilities of a token, as many as the sequence asks for."""
    if (likeliest := sequence.request.params.logprobs) is not None:
        sequence.logprobs.append(TokenLogprob(token, drawn, list(zip(ids, top, strict=True))[:likeliest]))


def _closed_engine() -> ModelClosed:
    return ModelClosed("a closed generation", rule="it ends with its model", remedy="Start another on an open model")


def _not_a_number(sequence: Sequence, dtype: torch.dtype) -> NaNLogits:
    return NaNLogits(
        f"a NaN among the logits of token {len(sequence.token_ids) + 1} after a prompt of "
        f"{sequence.timings.prompt_tokens}, activations in {dtype}",
        rule="logits are numbers",
        remedy="rooflama check finds weights that are NaN; float16 overflows where bfloat16 does not",
    )
