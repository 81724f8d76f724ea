"""A loaded model: text in, text out."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import replace
from random import Random, SystemRandom
from typing import Any, Self

import torch
from torch import Tensor

from rooflama.loaders.device import Device
from rooflama.loaders.text.tokenizer import Tokenizer
from rooflama.models import (
    ArgumentError,
    MemoryPlan,
    ModelClosed,
    ModelConfig,
    ModelRunner,
    Request,
    SamplingParams,
    Sequence,
    TokenEngine,
)
from rooflama.models.decoder import LOGITS_ROWS, Observer
from rooflama.models.serving.engine import MOST_SLOTS

from . import arguments, states
from .arguments import Prompt, RequestOptions
from .results import Generation, Stream, TextStream, generation

MOST_SEEDS = 2**63


class Model:
    """A checkpoint on a device, from ``rooflama.load``. Close it, or use it as a context manager.

    Several threads may use one model. Their requests advance together, in steps of one ``engine``, while the page pool
    holds them. One that does not fit waits, or gives its pages up and reads its text again later; its logits then agree
    up to rounding, and in every bit with ``batch_invariant=True``.
    """

    def __init__(
        self,
        name: str,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        device: Device,
        *,
        weight_bytes: int,
        plan: MemoryPlan,
        prefix_cache: bool = True,
    ):
        self.name = name
        self.runner = runner
        self.config: ModelConfig = runner.decoder.config
        self.tokenizer = tokenizer
        self.device = device
        self.weight_bytes = weight_bytes
        self.plan = plan
        self.tokens = TokenEngine(
            runner, tokenizer.eos_ids, num_slots=max(MOST_SLOTS, plan.sequences), prefix_cache=prefix_cache
        )
        ranks = runner.decoder.ranks  # all of them draw the same seeds
        self._seeds = SystemRandom() if ranks is None else Random(ranks.exchange(secrets.randbits(64))[0])
        self._closed = False

    @property
    def max_context(self) -> int:
        """The most tokens of a sequence, prompt included."""
        return self.plan.context

    def logits(self, token_ids: Items[int] | Tensor, *, observe: Observer | None = None) -> Tensor:
        """Teacher-forced logits: row i scores the token after ``token_ids[: i + 1]``.

        Args:
            token_ids: 1 to ``max_context`` ids of this model's vocabulary, as a sequence or an array.
            observe: called with (name, layer index, tensor) for each layer's "q", "k", "v" and "hidden", on the
                device and one prefill pass at a time; ``rooflama.trace`` collects them.

        Returns:
            float32 [num_tokens, vocab_size] on the CPU.

        Raises:
            ArgumentError: there are no tokens, an unknown token, or more tokens than the context holds.
        """
        with self.prefill(arguments.token_ids(token_ids), observe) as passes:
            rows = (part for hidden in passes for part in hidden.split(LOGITS_ROWS))
            return torch.cat([self.runner.decoder.logits(part).cpu() for part in rows])

    @contextmanager
    def prefill(self, token_ids: list[int], observe: Observer | None) -> Iterator[Iterator[Tensor]]:
        """The prefill passes over one prompt: the residual stream [num_tokens, hidden_size] after the last layer.

        A pass runs when the iterator reaches it. Other requests wait until the ``with`` block ends.
        """
        request = Request(token_ids, 0, SamplingParams())
        self._check_open()
        self.runner.check(request)
        with self.tokens.pages_for(len(token_ids)) as sequence_id:
            self._check_open()
            watched = None if observe is None else self._watched(observe)
            passes = self.runner.prefill([sequence_id], [token_ids], [len(token_ids)], watched)
            with self.device.guard("logits"):
                yield (hidden for _, hidden in passes)

    def _watched(self, observe: Observer) -> Observer:
        def watch(name: str, layer: int, tensor: Tensor) -> None:
            observe(name, layer, tensor)
            self._check_open()  # the weights of the next layer are gone if it closed the model

        return watch

    def generate(
        self,
        prompt: Prompt | Items[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        n: int = 1,
        logprobs: int | None = None,
    ) -> Generation | list[Generation]:
        """Continue one prompt, or each of a list of prompts.

        Args:
            prompt: text, or token ids (a sequence or a one-dimensional array of integers), or a list of either. Text is
                encoded with the model's beginning tokens, and special tokens in it are read as such.
            max_new_tokens: the most new tokens. None: until the model ends its text or the context is full; prompts of
                a batch then take pages as their texts grow, and one that finds none free waits and reads its text
                again.
            temperature: logits are divided by it before a token is drawn; 0 takes the likeliest token.
            top_k, top_p, min_p: keep the k likeliest tokens, the likeliest that reach probability p together, and those
                of at least this share of the likeliest's probability; 0, 1 and 0 are off.
            repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the
                text; 1 is off.
            frequency_penalty: subtracted from a token's logit once for each time it was generated; 0 is off.
            presence_penalty: subtracted once from the logit of each token that was generated; 0 is off.
            logit_bias: token id -> number added to its logit, before the penalties.
            seed: reproduces a draw. The i-th result of a call draws with ``seed + i``, in a batch as alone. None picks
                seeds; each result states its own.
            stop: text that ends the generation when it appears; it is not part of the result. Tokens that are not
                shown, such as ``<|im_end|>``, count with their text.
            n: results per prompt, each with its own random stream, one after the other in a flat list.
            logprobs: how many of the likeliest tokens to report with each token, besides the token itself: log
                probabilities from the logits before biases, penalties and temperature. None for no report.

        Returns:
            A Generation; a list of them for a list of prompts, or for ``n`` above 1.

        Raises:
            ArgumentError: the prompt is empty, an option has a wrong type or is out of range, or the context is too
                short.
        """
        options = RequestOptions.of(locals())
        prompts, single = arguments.prompts(prompt)
        repeated = [item for item in prompts for _ in range(options.n)]
        running = list(self.sequences(repeated, options))
        try:
            for sequence, _ in running:
                self.tokens.add(sequence)
            for sequence, _ in running:
                self.tokens.advance(sequence, until=lambda: False)
        finally:
            for sequence, _ in running:
                self.tokens.cancel(sequence)
        results = [generation(sequence, text) for sequence, text in running]
        return results[0] if single and options.n == 1 else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        logprobs: int | None = None,
    ) -> Stream:
        """Like ``generate`` for a single prompt; iterating over the result yields text as it is produced."""
        options = RequestOptions.of(locals())
        prompts, single = arguments.prompts(prompt)
        if not single:
            raise ArgumentError(
                f"a list of {len(prompts)} prompts",
                rule="a stream has one prompt",
                remedy="Open a stream for each",
            )
        ((sequence, text),) = self.sequences(prompts, options)
        return Stream(self.tokens, sequence, text)

    def chat(
        self,
        messages: Items[Mapping[str, Any]],
        *,
        tools: Items[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Answer a conversation: a list of {"role": ..., "content": ...}, through the model's own chat template.

        Args:
            messages: as for ``Tokenizer.apply_chat_template``.
            tools: JSON schemas of functions that the model may ask to be called.
            add_generation_prompt: begin the assistant's turn; False to continue the last message.
            options: those of ``generate``, and variables of the template, such as ``enable_thinking=False``. A warning
                names options that are neither.

        Returns:
            A Generation, or a list of them where ``n`` asks for several.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        known = inspect.signature(self.generate).parameters.keys() - {"prompt"}
        variables = {name: value for name, value in options.items() if name not in known}
        ids = self.tokenizer.encode_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        options = {name: value for name, value in options.items() if name in known}
        return self.generate(ids, **options)

    def save_state(self, prompt: Prompt, path: str | os.PathLike[str], *, max_new_tokens: int | None = None) -> None:
        """Write the keys and values of a prompt to a file, so that a long prompt is computed once.

        Args:
            prompt: text, or token ids, as for ``generate``.
            path: of the file, in the safetensors format. It takes as many bytes as the prompt's pages.
            max_new_tokens: of the requests that will continue the prompt. It matters to models whose rotation follows
                from the planned length (LongRoPE and dynamic scaling): theirs must choose the same one.

        Raises:
            ArgumentError: as for ``generate``.
            ModelClosed: the model is closed.
        """
        options = RequestOptions.of({"max_new_tokens": max_new_tokens})
        prompts, _ = arguments.prompts(prompt)
        ((sequence, _),) = self.sequences(prompts[:1], options)
        states.save(self.tokens, sequence.request.prompt, options.max_new_tokens, path)

    def load_state(self, path: str | os.PathLike[str]) -> list[int]:
        """Read a file of ``save_state``. Prompts that begin with its tokens then begin with its keys and values.

        They are kept like those of any earlier request: until their pages are needed for something else.

        Returns:
            The token ids of the prompt that was saved.

        Raises:
            StateError: the file holds no state, or one of another model, rotation or dtype. Nothing was changed.
            OutOfPages: the page pool is smaller than the state.
            ModelClosed: the model is closed.
        """
        self._check_open()
        return states.load(self.tokens, path)

    def sequences(
        self, prompts: Items[str | list[int]], options: RequestOptions
    ) -> Iterator[tuple[Sequence, TextStream]]:
        """New sequences for ``self.tokens``, each with the text of its tokens, whose stop strings end it."""
        self._check_open()
        for row, prompt in enumerate(prompts):
            ids = self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
            if options.seed is None:
                seed = self._seeds.getrandbits(32) if options.params.temperature > 0 else 0
            else:
                seed = options.seed if row == 0 else (options.seed + row) % MOST_SEEDS
            request = Request(ids, options.max_new_tokens, replace(options.params, seed=seed))
            self.runner.check(request)
            text = TextStream(self.tokenizer, options.stop, after=ids[-1])
            yield Sequence(request, text.write), text

    def describe(self) -> str:
        """Device, dtype of activations, bytes of weights and context, in words."""
        dtype = str(self.plan.dtype).removeprefix("torch.")
        return (
            f"{self.device.name}, {dtype} activations, {self.weight_bytes / 2**20:.0f} MiB of weights, "
            f"context {self.max_context}"
        )

    def __repr__(self) -> str:
        return f"Model({self.config.name!r}, {'closed' if self._closed else self.describe()})"

    def close(self) -> None:
        """End every request and free everything on the device.

        A request of another thread raises ModelClosed after its current step. ``close`` may be called again, also to
        complete one that was interrupted.
        """
        self._closed = True
        self.tokens.close()
        with self.tokens.turns.turn():
            self.__dict__.pop("runner", None)  # views of the weights would keep their memory
            self.device.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ModelClosed(
                f"model {self.name} is closed", rule="a closed model holds no weights", remedy="Load it again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
