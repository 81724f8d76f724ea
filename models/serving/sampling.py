"""How the next token of a sequence is drawn: a request's parameters, and what is reported of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

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
