"""How the next token of each sequence is drawn: a request's parameters, and their form on the device for a batch.

The order is vLLM's: log probabilities of the unchanged logits, logit biases, penalties, then temperature and filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rooflama.kernels import penalise, sample

from ..errors import ArgumentError

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k, top_p, min_p: keep the k likeliest tokens, the likeliest that reach probability p together, and those of
            at least this share of the likeliest's probability; 0, 1 and 0 are off.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the text;
            1 is off.
        frequency_penalty: subtracted from a token's logit once for each time it was generated; 0 is off.
        presence_penalty: subtracted once from the logit of each token that was generated; 0 is off.
        logit_bias: token id -> number added to its logit, before the penalties.
        seed: of the sequence's random stream.
        logprobs: how many of the likeliest tokens to report at each step, besides the one drawn; None for no report.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature <= FLOAT32_MAX, "finite and at least 0")
        _require("top_k", self.top_k, self.top_k >= 0, "at least 0; 0 is off")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1; 1 is off")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1; 0 is off")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        repetition = FLOAT32_TINY <= self.repetition_penalty <= FLOAT32_MAX
        _require("repetition_penalty", self.repetition_penalty, repetition, "positive and finite; 1 is off")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(name, value, abs(value) <= FLOAT32_MAX, "finite; 0 is off")
        for token, bias in self.logit_bias.items():
            _require(f"logit_bias of token {token}", bias, abs(bias) <= FLOAT32_MAX, "finite")
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, self.logprobs >= 0, "at least 0, or None")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def check(self, num_tokens: int) -> None:
        """Raise ArgumentError if a bias or ``logprobs`` exceeds a vocabulary of ``num_tokens``."""
        for token in self.logit_bias:
            _require("logit_bias of token", token, 0 <= token < num_tokens, f"for ids 0 to {num_tokens - 1}")
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, self.logprobs <= num_tokens, f"at most {num_tokens}, the vocabulary")


def _require(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ArgumentError(f"{name} {value}", rule=f"{name} is {rule}", remedy="Correct the sampling parameter")


class TokenLogprob(NamedTuple):
    """Log probabilities of one step, from the logits before biases, penalties and temperature.

    Attributes:
        token_id, logprob: of the token drawn.
        top: (token id, log probability) of the likeliest tokens, the likeliest first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws one token per sequence of a batch. Its state is on the device, so that a CUDA graph can capture a draw.

    Options that no sequence uses take neither memory nor time. Penalties take 4 bytes per sequence and token id.

    Args:
        params: one for each sequence.
        prompts, drawn: each sequence's prompt, and the tokens drawn so far.
        num_rows: width of the logits.
        num_tokens: ids from here on are padding and never drawn; None if there is no padding.
        device: where the logits are.

    Attributes:
        logprobs: of the last draw: (log probability of the token drawn [n], ids of the likeliest [n, k], their log
            probabilities [n, k]); None if no sequence asks for them.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        drawn: Sequence[Sequence[int]],
        *,
        num_rows: int,
        num_tokens: int | None,
        device: torch.device,
    ):
        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._num_tokens = num_tokens
        self._steps = column([len(tokens) for tokens in drawn], torch.int64)  # tokens drawn
        self._filters: dict[str, Tensor] = {}  # without any, sampling is greedy
        if any(p.temperature > 0 for p in params):
            self._filters["temperature"] = column([p.temperature for p in params], torch.float32)
            self._filters["seeds"] = column([p.seed for p in params], torch.int64)
            for name, off, dtype in (
                ("top_k", 0, torch.int32),
                ("top_p", 1, torch.float32),
                ("min_p", 0, torch.float32),
            ):
                values = [min(getattr(p, name), num_rows) for p in params]
                if any(value != off for value in values):
                    self._filters[name] = column(values, dtype)

        biases = [(row * num_rows + id_, bias) for row, p in enumerate(params) for id_, bias in p.logit_bias.items()]
        self._biased = column([place for place, _ in biases], torch.int64)  # in the flattened logits
        self._biases = column([bias for _, bias in biases], torch.float32)

        self._seen: Tensor | None = None  # as ``penalise`` takes it
        self._penalties: list[Tensor] = []
        if any(p.penalises for p in params):
            self._seen = torch.zeros(len(params), num_rows, dtype=torch.int32, device=device)
            for row, p in enumerate(params):
                if p.penalises:
                    self._seen[row] = torch.from_numpy(_seen(prompts[row], drawn[row], num_rows)).to(device)
            self._penalties = [
                column([getattr(p, f"{name}_penalty") for p in params], torch.float32)
                for name in ("repetition", "frequency", "presence")
            ]

        self.logprobs: tuple[Tensor, Tensor, Tensor] | None = None
        if asked := [p.logprobs for p in params if p.logprobs is not None]:
            shape = (len(params), max(asked))
            self.logprobs = (
                torch.zeros(len(params), device=device),
                torch.zeros(shape, dtype=torch.int64, device=device),
                torch.zeros(shape, device=device),
            )

    def draw(self, logits: Tensor) -> Tensor:
        """One token per row of float32 logits [n, num_rows]: int32 [n], -1 for a row with a NaN."""
        adjusted = logits
        if self.logprobs is not None and (len(self._biased) or self._seen is not None):
            adjusted = logits.clone()
        if len(self._biased):
            flat = adjusted.view(-1)
            flat.scatter_(0, self._biased, flat.gather(0, self._biased) + self._biases)
        if self._seen is not None:
            penalise(adjusted, self._seen, *self._penalties)
        tokens = sample(adjusted, steps=self._steps, vocab_size=self._num_tokens, **self._filters)
        self._steps += 1
        places = tokens.clamp(min=0).long().unsqueeze(1)
        if self._seen is not None:
            self._seen.scatter_(1, places, self._seen.gather(1, places) + 2)
        if self.logprobs is not None:
            _report(logits[:, : self._num_tokens], places, *self.logprobs)
        return tokens


def _report(logits: Tensor, places: Tensor, drawn: Tensor, top_ids: Tensor, top: Tensor) -> None:
    """Write the log probabilities of the tokens drawn, ``places`` [n, 1], and of the likeliest tokens."""
    total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(top.shape[1])
    drawn.copy_((logits.gather(1, places) - total).squeeze(1))
    top_ids.copy_(ids)
    top.copy_(values - total)


def _seen(prompt: Sequence[int], drawn: Sequence[int], num_rows: int) -> np.ndarray:
    """int32 [num_rows]: 1 for a token of the prompt, plus 2 for each time that the token was drawn."""
    in_prompt = np.zeros(num_rows, np.int32)
    in_prompt[np.asarray(prompt, np.int64)] = 1
    return in_prompt + 2 * np.bincount(np.asarray(drawn, np.int64), minlength=num_rows).astype(np.int32)
