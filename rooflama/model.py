"""A loaded model: text in, text out."""

from __future__ import annotations

import inspect
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from rooflama.loaders.device import Device
from rooflama.loaders.tokenizer import Tokenizer
from rooflama.models import ConfigError, Engine, MemoryPlan, ModelConfig, Request, SamplingParams, Timings
from rooflama.models import Generation as TokenRun
from rooflama.models.decoder import LOGITS_ROWS

from .text_stream import TextStream

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """What came back for one prompt.

    Attributes:
        text: the new text, without the prompt and without the tokens that ended it.
        token_ids: every token drawn, the ending one included.
        finish_reason: ``stop`` (an end token or a stop string) or ``length`` (max_new_tokens).
        timings: prompt tokens, seconds, steps.
        seed: what reproduces a sampled text.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    seed: int

    def _repr_html_(self) -> str:
        from html import escape

        t = self.timings
        note = (
            f"{t.prompt_tokens} prompt tokens in {t.prefill_s:.2f} s, {len(self.token_ids)} new at "
            f"{t.decode_tokens_per_s:.1f} tokens/s, ended by {self.finish_reason}"
        )
        return f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre><small>{escape(note)}</small>"


class Model:
    """A checkpoint on a device. Made by ``rooflama.load``; close it, or use it as a context manager."""

    def __init__(
        self,
        *,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        device: Device,
        weight_bytes: int,
        plan: MemoryPlan,
    ):
        self.name = name
        self.engine = engine
        self.config: ModelConfig = engine.decoder.config
        self.tokenizer = tokenizer
        self.device = device
        self.weight_bytes = weight_bytes
        self.plan = plan
        self._runs: weakref.WeakSet[TokenRun] = weakref.WeakSet()
        self._closed = False

    @property
    def max_context(self) -> int:
        """Tokens a sequence may reach, prompt included."""
        return self.plan.context

    def logits(self, token_ids: Sequence[int], *, observe: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Teacher-forced logits: row i scores the token after ``token_ids[: i + 1]``.

        Args:
            token_ids: 1 to ``max_context`` ids of this model's vocabulary.
            observe: called with (layer index, residual stream) after each layer.

        Returns:
            float32 [num_tokens, vocab_size] on the CPU.

        Raises:
            ConfigError: no tokens, an unknown token, or more tokens than the context.
        """
        self._check_open()
        request = Request(list(token_ids), 0, SamplingParams())
        request.check(self.engine)
        cache = self.engine.cache
        sequence_id = cache.add()
        try:
            passes = self.engine.prefill([sequence_id], [request.prompt], [request.planned_tokens], observe)
            with self.device.guard("logits"):
                rows = (part for _, hidden in passes for part in hidden.split(LOGITS_ROWS))
                return torch.cat([self.engine.decoder.logits(part).cpu() for part in rows])
        finally:
            cache.free(sequence_id)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation | list[Generation]:
        """Continue one prompt, or each of a list of prompts.

        Args:
            prompt: text, or token ids, or a list of either. Text is encoded with the model's special beginning tokens,
                and its own special tokens are read as such.
            max_new_tokens: at most so many tokens follow.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
            top_k, top_p, min_p: narrow the choice; 0, 1 and 0 are off.
            seed: reproduces a draw; None picks one, which the result names.
            stop: text that ends the generation when it appears; not part of the result.

        Returns:
            A Generation, or a list of them for a list of prompts.

        Raises:
            ConfigError: an empty prompt, a parameter out of range, or more tokens than the context holds.
        """
        single = isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], int)
        prompts = cast(
            "list[Prompt]", [prompt] if single else list(prompt)
        )  # ``single`` says which, mypy cannot see it
        params = _sampling(temperature, top_k, top_p, min_p, seed)
        run, streams = self._start(prompts, max_new_tokens, params, stop)
        texts = ["" for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        for number, token in run:
            token_ids[number].append(token)
            texts[number] += streams[number].feed(token)
            if streams[number].finished:
                run.finish(number)
        results = [
            Generation(text + stream.flush(), ids, stream.finish_reason, timings, params.seed)
            for text, ids, stream, timings in zip(texts, token_ids, streams, run.timings, strict=True)
        ]
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Stream:
        """The same for one prompt, piece by piece as it is made: iterate over what this returns."""
        params = _sampling(temperature, top_k, top_p, min_p, seed)
        run, (text_stream,) = self._start([prompt], max_new_tokens, params, stop)
        return Stream(run, text_stream)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> Generation:
        """Answer a conversation: a list of {"role": ..., "content": ...}, through the model's own chat template.

        Args:
            messages: as ``Tokenizer.apply_chat_template`` takes them.
            tools: JSON schemas of functions that the model may ask to be called.
            add_generation_prompt: open the assistant's turn; False continues what the last message leaves open.
            options: ``generate``'s go to ``generate``; every other one is a variable of the template, such as
                ``enable_thinking=False``. A warning names those that neither uses.

        Raises:
            ChatTemplateError: there is no template, or it does not take the messages.
        """
        known = inspect.signature(self.generate).parameters.keys() - {"prompt"}
        variables = {name: value for name, value in options.items() if name not in known}
        ids = self.tokenizer.encode_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        options = {name: value for name, value in options.items() if name in known}
        return self.generate(ids, **options)  # type: ignore[return-value]

    def _start(
        self, prompts: Sequence[Prompt], max_new_tokens: int, params: SamplingParams, stop: str | Sequence[str]
    ) -> tuple[TokenRun, list[TextStream]]:
        self._check_open()
        requests = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else list(prompt)
            requests.append(Request(ids, max_new_tokens, params))
        stops = [stop] if isinstance(stop, str) else list(stop)
        run = TokenRun(self.engine, requests, self.tokenizer.eos_ids)
        self._runs.add(run)
        return run, [TextStream(self.tokenizer, stops, after=request.prompt[-1]) for request in requests]

    def describe(self) -> str:
        """Where it runs and in what, for people: device, activations, weights' bytes, context."""
        dtype = str(self.plan.dtype).removeprefix("torch.")
        return (
            f"{self.device.name}, {dtype} activations, {self.weight_bytes / 2**20:.0f} MiB of weights, "
            f"context {self.max_context}"
        )

    def __repr__(self) -> str:
        return f"Model({self.config.name!r}, {'closed' if self._closed else self.describe()})"

    def close(self) -> None:
        """End every stream and free everything on the device. May be called twice."""
        if not self._closed:
            self._closed = True
            for run in list(self._runs):
                run.close()
            del self.engine  # its views of the weights would keep their memory
            self.device.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(
                f"model {self.name} is closed", rule="a closed model holds no weights", remedy="Load it again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stream:
    """Pieces of one generation's text, none of which ends inside a character.

    Attributes:
        timings, finish_reason: as in Generation, final once the iteration has ended.
    """

    def __init__(self, run: TokenRun, text: TextStream):
        self._run, self._text = run, text

    @property
    def timings(self) -> Timings:
        return self._run.timings[0]

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


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> SamplingParams:
    if seed is None:
        seed = secrets.randbits(32) if temperature > 0 else 0
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
