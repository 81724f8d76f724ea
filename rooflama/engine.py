"""Many requests on one model, each served as if alone: add them, step, and read their tokens as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from rooflama.models import ArgumentError, Sequence

from . import arguments
from .arguments import Prompt, RequestOptions
from .engine_table import EngineTable
from .model import Model


class Engine:
    """Runs requests on a loaded model together: each step lets every running sequence draw a token.

    engine = rooflama.Engine(model)
    first, second = engine.add("Once upon"), engine.add("2 + 2 =", max_new_tokens=4, temperature=0.8)
    for sequence, token in engine:
        ...

    A request that finds no free pages waits. When a running sequence needs a page and none is free, the newest sequence
    gives its pages up and is computed again later. Requests are served in the order in which they were added. Every
    method may be called by any thread; ``Model.generate``, ``stream`` and ``chat`` use the same steps.
    """

    def __init__(self, model: Model):
        self.model = model
        self._tokens = model.tokens

    def add(self, prompt: Prompt, **options: Any) -> Sequence:
        """Add a request.

        Args:
            prompt: text, or token ids, as for ``Model.generate``.
            options: those of ``Model.generate`` but for ``n``.

        Returns:
            Its sequence. ``token_ids``, ``finish_reason``, ``logprobs`` and ``timings`` grow with each step.

        Raises:
            ArgumentError: as for ``Model.generate``, or an unknown option.
            ModelClosed: the model is closed.
        """
        unknown = options.keys() - RequestOptions.NAMES
        if unknown:
            raise ArgumentError(
                f"option {min(unknown)}",
                rule=f"the options are {', '.join(sorted(RequestOptions.NAMES))}",
                remedy="Leave it out",
            )
        prompts, single = arguments.prompts(prompt)
        if not single:
            raise ArgumentError(
                f"a list of {len(prompts)} prompts", rule="a sequence has one prompt", remedy="Add one after the other"
            )
        ((sequence, _),) = self.model.sequences(prompts, RequestOptions.of(options))
        self._tokens.add(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, int]]:
        """Compute one step. Returns the tokens that it handed out, each with its sequence.

        A step that only reads prompts hands out none, so that ``has_work`` says whether to go on. An error ends the
        sequence that it concerns, as ``Sequence.error``; the others go on.
        """
        return self._tokens.step()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back. Nothing happens to one that has ended."""
        self._tokens.cancel(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return self._tokens.has_work

    def forget_prefixes(self) -> None:
        """Let no new sequence begin with pages that are known now. Call it after changing the model's weights.

        Raises:
            ModelClosed: the model is closed.
        """
        self._tokens.forget_prefixes()

    def table(self) -> EngineTable:
        """The sequences and the pages at this moment, for a terminal and for Jupyter.

        Raises:
            ModelClosed: the model is closed.
        """
        return EngineTable.of(self._tokens)

    def tokens(self, sequence: Sequence) -> Tokens:
        """The tokens of one sequence as they come, for ``for`` and for ``async for``."""
        return Tokens(self, sequence)

    def __iter__(self) -> Iterator[tuple[Sequence, int]]:
        """(sequence, token) of all sequences, as this iteration's steps hand them out, until none is left."""
        while self.has_work:
            yield from self.step()

    async def __aiter__(self) -> AsyncIterator[tuple[Sequence, int]]:
        while self.has_work:
            for entry in await asyncio.to_thread(self.step):
                yield entry


class Tokens:
    """The tokens of one sequence, from its first on. Asking for the next one computes steps until it is there.

    ``async for`` computes the steps in worker threads of the event loop.

    Raises:
        ModelClosed, NaNLogits, DeviceError, OutOfPages: while iterating; what ended the sequence before its time.
    """

    def __init__(self, engine: Engine, sequence: Sequence):
        self._engine, self._sequence, self._read = engine, sequence, 0

    def __iter__(self) -> Iterator[int]:
        while (token := self._next()) is not None:
            yield token

    async def __aiter__(self) -> AsyncIterator[int]:
        while (token := await asyncio.to_thread(self._next)) is not None:
            yield token

    def _next(self) -> int | None:
        drawn = self._sequence.token_ids
        self._engine.model.tokens.advance(self._sequence, until=lambda: len(drawn) > self._read)
        if len(drawn) == self._read:
            return None
        self._read += 1
        return drawn[self._read - 1]
