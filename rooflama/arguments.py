"""Checks of the types of arguments. A wrong one raises ArgumentError, which names the argument and its value.

Numbers of numpy and torch are accepted as Python's are. A bool is no number, and a float is no count, whatever its
value.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rooflama.models import ArgumentError, SamplingParams

Prompt = str | Sequence[int] | np.ndarray | torch.Tensor

MOST_RESULTS = 2**16  # of one prompt in one call
TOP_K_MAX = 2**31 - 1  # more than any vocabulary has; larger values have the same effect
SHOWN = 80  # characters of a value in an error


def whole(name: str, value: Any, rule: str) -> int:
    """``value`` as an int of any size."""
    if not _is_bool(value) and not isinstance(value, str | bytes):
        try:
            return operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise _refused(name, value, rule)


def whole_or_none(name: str, value: Any, rule: str) -> int | None:
    return None if value is None else whole(name, value, rule)


def number(name: str, value: Any, rule: str) -> float:
    """``value`` as a float of any size."""
    is_scalar = isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0
    if not _is_bool(value) and (isinstance(value, numbers.Real) or is_scalar):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
    raise _refused(name, value, rule)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _refused(name, value, f"{name} is True or False")
    return bool(value)


def stops(stop: Any) -> list[str]:
    """The strings that end a text; None means none."""
    if stop is None:
        return []
    found = [stop] if isinstance(stop, str) else stop
    is_scalar = getattr(found, "ndim", 1) == 0  # of numpy or torch
    if is_scalar or not isinstance(found, Iterable) or isinstance(found, Mapping | bytes):
        raise _refused("stop", stop, "stop is a string, a list of strings, or None")
    found = list(found)
    for text in found:
        if not isinstance(text, str) or not text:
            raise _refused("stop string", text, "a stop string is a text of one character or more")
    return found


def biases(name: str, value: Any, rule: str) -> dict[int, float]:
    """Token id -> number added to its logit; None means none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refused(name, value, rule)
    return {
        whole(f"token id of {name}", token, "token ids are whole numbers"): number(
            f"{name} of token {_short(token)}", bias, "a bias is a finite number"
        )
        for token, bias in value.items()
    }


def top_k(name: str, value: Any, rule: str) -> int:
    return min(whole(name, value, rule), TOP_K_MAX)


SAMPLING: dict[str, tuple[Callable[[str, Any, str], Any], str]] = {
    "temperature": (number, "temperature is a number; 0 takes the likeliest token"),
    "top_k": (top_k, "top_k is a whole number; 0 is off"),
    "top_p": (number, "top_p is a number above 0 and at most 1; 1 is off"),
    "min_p": (number, "min_p is a number from 0 to 1; 0 is off"),
    "repetition_penalty": (number, "it is a positive number; 1 is off"),
    "frequency_penalty": (number, "it is a number; 0 is off"),
    "presence_penalty": (number, "it is a number; 0 is off"),
    "logit_bias": (biases, "logit_bias maps token ids to numbers"),
    "logprobs": (whole_or_none, "logprobs is a whole number, or None"),
}
"""Parameter of ``SamplingParams`` -> the check of its type, and the rule for the error."""


@dataclass(frozen=True)
class RequestOptions:
    """The options of ``Model.generate`` and ``Model.stream``, checked.

    Attributes:
        params: how tokens are drawn.
        max_new_tokens, seed, stop, n: as for ``Model.generate``.
    """

    params: SamplingParams
    max_new_tokens: int | None
    seed: int | None
    stop: list[str]
    n: int

    NAMES: ClassVar[frozenset[str]] = frozenset({*SAMPLING, "max_new_tokens", "seed", "stop"})  # of one sequence

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RequestOptions:
        """The options in ``given``, which maps names to values; others have their defaults. Raises ArgumentError."""
        n = whole("n", given.get("n", 1), "n is a whole number, 1 or more")
        if not 1 <= n <= MOST_RESULTS:
            rule = f"n is from 1 to {MOST_RESULTS:,}"
            raise ArgumentError(f"n {n}", rule=rule, remedy="Pass such a number, and call again for more")
        limit_rule = "max_new_tokens is a whole number, 1 or more, or None for as many as the context holds"
        limit = whole_or_none("max_new_tokens", given.get("max_new_tokens"), limit_rule)
        if limit is not None and limit < 1:
            raise ArgumentError(f"max_new_tokens {limit}", rule=limit_rule, remedy="Ask for 1 or more")
        options = {name: check(name, given[name], rule) for name, (check, rule) in SAMPLING.items() if name in given}
        seed = whole_or_none("seed", given.get("seed"), "a seed is a whole number, or None")
        return cls(SamplingParams(seed=seed or 0, **options), limit, seed, stops(given.get("stop")), n)


def token_ids(value: Any) -> list[int]:
    """The ids of one prompt, from a sequence of whole numbers or a one-dimensional array of integers."""
    if isinstance(value, np.ndarray | torch.Tensor):
        is_integer = (
            value.dtype.kind in "iu"
            if isinstance(value, np.ndarray)
            else not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        )
        if value.ndim != 1 or not is_integer:
            raise ArgumentError(
                f"token ids in an array of shape {list(value.shape)} and dtype {value.dtype}",
                rule="the ids of a prompt are one row of integers",
                remedy="Pass one row, such as ids[0]; for several prompts, a list of rows",
            )
        return value.tolist()
    if isinstance(value, str):
        raise ArgumentError(
            f"text {value[:20]!r}", rule="token ids are whole numbers", remedy="Pass model.tokenizer.encode(text)"
        )
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise _refused("prompt", value, "a prompt is text, or a sequence of token ids")
    return [whole("token id", token, "token ids are whole numbers") for token in value]


def prompts(value: Any) -> tuple[list[str | list[int]], bool]:
    """(the prompts, each as text or ids, and whether ``value`` is a single one)."""
    if isinstance(value, str | np.ndarray | torch.Tensor) or not isinstance(value, Sequence):
        return [value if isinstance(value, str) else token_ids(value)], True
    if any(_is_prompt(item) for item in value):
        return [item if isinstance(item, str) else token_ids(item) for item in value], False
    return [token_ids(value)], True


def _is_prompt(item: Any) -> bool:
    """Whether an item of a list is a prompt rather than a token id."""
    if isinstance(item, np.ndarray | torch.Tensor):
        return item.ndim > 0
    return isinstance(item, Sequence)


def _is_bool(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.dtype in (torch.bool, np.bool_)
    return isinstance(value, bool | np.bool_)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refused(name: str, value: Any, rule: str) -> ArgumentError:
    return ArgumentError(f"{name} {_short(value)} ({type(value).__name__})", rule=rule, remedy=f"Pass another {name}")
