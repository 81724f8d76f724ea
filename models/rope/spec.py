"""Rotary position embedding: from a model's parameters to the cos and sin tables that the kernels read.

A head's first ``rotary_dim`` dimensions form pairs j = 0 .. rotary_dim/2 - 1. Pair j at position p turns by the angle
p * w_j. With the plain frequency f_j = base^(-2j / rotary_dim), the kinds of scaling differ only in w_j and in a factor
a on cos and sin, which multiplies attention scores by a^2:

    default    w = f                                                                   (Su et al., 2021)
    linear     w = f / factor                                                          (Chen et al., 2023)
    dynamic    w = f of a larger base, which grows with the sequence's length          (NTK-aware; emozilla, 2023)
    yarn       w = f for fast pairs, f / factor for slow ones, a ramp between;
               a = 1 + 0.1 ln(factor)                                                  (Peng et al., 2023)
    longrope   w = f / e, e a searched list of divisors, one for short and one for long sequences;
               a = sqrt(1 + ln(factor) / ln(original_context))                         (Ding et al., 2024)
    llama3     w = f for short wavelengths, f / factor for long ones, a blend between  (Llama 3.1, 2024)

GGUF files store llama3's result as one divisor per pair (``rope_freqs.weight``). Such divisors also combine with linear
and yarn: they divide f before anything else.

Angles are computed in float64, and cos and sin rounded once to float32. At position 131071 a float32 angle is off by up
to 4e-3 radians, twice the error of rounding cos to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np

from rooflama.kernels.errors import RooflamaError

FactorSet = Literal["short", "long"]
FactorSetPolicy = Literal["auto", "short", "long"]


class RopeError(RooflamaError, ValueError):
    """Rotary parameters that describe no rotation, or one that rooflama does not compute."""


def check(condition: bool, found: str, rule: str, remedy: str = "Correct the model's rotary parameters") -> None:
    if not condition:
        raise RopeError(found, rule=rule, remedy=remedy)


def check_positive(name: str, value: Any) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    rule = f"{name} is a finite number above 0, from 1e-30 to 1e30"
    check(real and 1e-30 <= value <= 1e30, f"{name} is {value!r}", rule)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The default kind, and the base of every other: computes the frequencies w and the attention factor a.

    A given ``attention_factor`` is used as it is; otherwise the kind derives it, and it is 1 if the kind has no rule.
    """

    kind: ClassVar[str] = "default"
    zero_allowed: ClassVar[tuple[str, ...]] = ()
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "tuple[float, ...]":
                check(isinstance(value, tuple), f"{field.name} is {value!r}", f"{field.name} has one number per pair")
                for entry in value:
                    check_positive(f"an entry of {field.name}", entry)
            elif field.type == "bool":
                check(isinstance(value, bool), f"{field.name} is {value!r}", f"{field.name} is true or false")
            elif value is not None and not (value == 0 and field.name in self.zero_allowed):
                check_positive(field.name, value)
                whole = field.type != "int" or value % 1 == 0
                check(whole, f"{field.name} is {value!r}", f"{field.name} counts tokens: it is a whole number")

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        return spec.plain_frequencies()

    def derived_attention_factor(self) -> float:
        return 1.0

    def reach(self, trained: int) -> float:
        """The context to which a model trained for ``trained`` tokens is extended; dynamic scaling sets no limit."""
        return trained


@dataclass(frozen=True, kw_only=True)
class Linear(Scaling):
    """w = f / factor."""

    kind: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        return spec.plain_frequencies() / self.factor

    def reach(self, trained: int) -> float:
        return trained * self.factor


@dataclass(frozen=True, kw_only=True)
class Dynamic(Scaling):
    """w = f of base * (factor * n / original - (factor - 1))^(d / (d - 2)), with n = max(seq_len, original)."""

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_context: int

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        d = spec.rotary_dim
        stretch = self.factor * max(seq_len or 0, self.original_context) / self.original_context - (self.factor - 1)
        return spec.plain_frequencies(spec.base * stretch ** (d / (d - 2)))


@dataclass(frozen=True, kw_only=True)
class Yarn(Scaling):
    """w = f * keep + f / factor * (1 - keep), with keep falling from 1 to 0 along a ramp over the pairs.

    The pair that makes r turns within the original context is c(r) = d ln(original / (2 pi r)) / (2 ln base). The ramp
    runs from c(beta_fast) to c(beta_slow), rounded outwards to whole pairs if ``truncate``. ``extrapolation_factor``
    multiplies keep (llama.cpp's yarn_ext_factor; transformers has none): at 0 every pair is divided by factor.

    Without a given ``attention_factor``, it is g(mscale) / g(mscale_all_dim) if both are given, else g(1), with
    g(m) = 1 + 0.1 m ln(factor), and 1 for factor <= 1. It is 1 for extrapolation_factor 0, as in llama.cpp.
    """

    kind: ClassVar[str] = "yarn"
    zero_allowed: ClassVar[tuple[str, ...]] = ("extrapolation_factor",)
    factor: float
    original_context: int
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.beta_fast >= self.beta_slow,
            f"beta_fast {self.beta_fast} and beta_slow {self.beta_slow}",
            "beta_fast is at least beta_slow",
        )

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        d = spec.rotary_dim

        def pair_of(turns: float) -> float:
            return d * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(spec.base))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        if low == high:
            high += 0.001
        keep = self.extrapolation_factor * (1 - np.clip((np.arange(d // 2) - low) / (high - low), 0, 1))
        plain = spec.plain_frequencies()
        return plain * keep + plain / self.factor * (1 - keep)

    def derived_attention_factor(self) -> float:
        def g(m: float) -> float:
            return 1.0 + 0.1 * m * math.log(self.factor) if self.factor > 1 else 1.0

        if self.extrapolation_factor == 0:
            return 1.0
        if self.mscale is not None and self.mscale_all_dim is not None:
            return g(self.mscale) / g(self.mscale_all_dim)
        return g(1.0)

    def reach(self, trained: int) -> float:
        return self.original_context * self.factor


@dataclass(frozen=True, kw_only=True)
class LongRope(Scaling):
    """w = f / short_factors or f / long_factors: see ``choose_factor_set``.

    Without a given ``attention_factor``, it is sqrt(1 + ln(factor) / ln(original)) for both lists, and 1 for
    factor <= 1. ``factor`` is the growth of the context, and is used for nothing else.
    """

    kind: ClassVar[str] = "longrope"
    factor: float
    original_context: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.original_context > 1, "original_context is 1", "its logarithm divides, so it is at least 2")

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        divisors = self.long_factors if factor_set == "long" else self.short_factors
        return spec.plain_frequencies() / np.array(divisors, dtype=np.float64)

    def derived_attention_factor(self) -> float:
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context)) if self.factor > 1 else 1.0

    def reach(self, trained: int) -> float:
        return self.original_context * self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3(Scaling):
    """w = f * keep + f / factor * (1 - keep), with keep = (turns - low) / (high - low) clamped to 0 .. 1.

    turns = original * f / (2 pi): the turns that the pair makes within the original context.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    original_context: int
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}",
            "low is below high",
        )

    def frequencies(self, spec: RopeSpec, factor_set: FactorSet | None, seq_len: int | None) -> np.ndarray:
        plain = spec.plain_frequencies()
        turns = self.original_context * plain / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * keep + plain / self.factor * (1 - keep)

    def reach(self, trained: int) -> float:
        return self.original_context * self.factor


KINDS: dict[str, type[Scaling]] = {cls.kind: cls for cls in (Scaling, Linear, Dynamic, Yarn, LongRope, Llama3)}
"""Every kind of scaling; other names raise."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """All parameters of a rotation. Immutable, hashable, and checked when it is made.

    Attributes:
        head_dim: dimensions of a head.
        rotary_dim: how many of them rotate, an even number; the others pass through.
        base: theta; the wavelength of pair j is 2 pi base^(2j / rotary_dim) positions.
        scaling: one of ``KINDS``, with its own parameters.
        frequency_divisors: GGUF's ``rope_freqs.weight``: rotary_dim / 2 numbers, each of which divides its pair's
            frequency. Only with the kinds default, linear and yarn.

    Raises:
        RopeError: a number is out of range, or a list has not one entry per pair.
    """

    head_dim: int
    rotary_dim: int
    base: float = 10_000.0
    scaling: Scaling = Scaling()
    frequency_divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check(
            self.rotary_dim % 2 == 0 and 2 <= self.rotary_dim <= self.head_dim,
            f"rotary_dim {self.rotary_dim} of head_dim {self.head_dim}",
            "rotary_dim is even and between 2 and head_dim",
        )
        check(
            self.rotary_dim > 2 or self.kind != Dynamic.kind,
            f"rotary_dim {self.rotary_dim}",
            "dynamic scaling raises to d / (d - 2), so rotary_dim is at least 4",
        )
        check_positive("the RoPE base", self.base)
        check(self.base > 1, f"the RoPE base is {self.base}", "the base is above 1, so that frequencies fall")
        lists = {field.name: getattr(self.scaling, field.name) for field in fields(self.scaling)}
        if self.frequency_divisors is not None:
            allowed = (Scaling.kind, Linear.kind, Yarn.kind)
            check(self.kind in allowed, f"frequency_divisors with kind {self.kind!r}", f"they go with {allowed}")
            for entry in self.frequency_divisors:
                check_positive("an entry of frequency_divisors", entry)
        for name, value in {**lists, "frequency_divisors": self.frequency_divisors}.items():
            if isinstance(value, tuple):
                pairs = self.rotary_dim // 2
                check(len(value) == pairs, f"{name} has {len(value)} entries", f"there are {pairs}, one for each pair")

    @property
    def kind(self) -> str:
        return self.scaling.kind

    def plain_frequencies(self, base: float | None = None) -> np.ndarray:
        """f_j = base^(-2j / rotary_dim), radians per position: float64 [rotary_dim // 2]."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        return np.float64(self.base if base is None else base) ** -exponents

    def describe(self) -> str:
        """One line for displays: the kind with its parameters, the base, and how much of a head rotates."""
        values = {field.name: getattr(self.scaling, field.name) for field in fields(self.scaling)}
        del values["attention_factor"]
        if (factor := attention_factor(self)) != 1:
            values["attention_factor"] = factor
        values["frequency_divisors"] = self.frequency_divisors
        shown = [
            f"{len(value)} {name}" if isinstance(value, tuple) else f"{name} {value:g}"
            for name, value in values.items()
            if value is not None
        ]
        kind = f"{self.kind} ({', '.join(shown)})" if shown else self.kind
        part = "" if self.rotary_dim == self.head_dim else f", {self.rotary_dim} of {self.head_dim} dimensions"
        return f"{kind}, base {self.base:g}{part}"


def choose_factor_set(spec: RopeSpec, planned_length: int, policy: FactorSetPolicy = "auto") -> FactorSet | None:
    """The list of longrope's divisors that a sequence uses from its first token to its last.

    Keys are cached already rotated, so a sequence must not change lists. ``planned_length`` decides: "long" strictly
    above ``original_context``, else "short". transformers decides at each step from the current length, and recomputes
    the cache when it crosses. The two agree for every sequence that ends on the side that was planned.

    Args:
        spec: of any kind; the result is None unless it is longrope.
        planned_length: tokens of the prompt, and the most that may be generated, together.
        policy: "short" and "long" force that list whatever the length.
    """
    check(policy in ("auto", "short", "long"), f"longrope policy {policy!r}", "it is auto, short or long", "Name one")
    if not isinstance(spec.scaling, LongRope):
        return None
    if policy != "auto":
        return policy
    return "long" if planned_length > spec.scaling.original_context else "short"


def inverse_frequencies(
    spec: RopeSpec, *, factor_set: FactorSet | None = None, seq_len: int | None = None
) -> np.ndarray:
    """w_j, radians per position: float64 [rotary_dim // 2].

    Args:
        spec: the rotation.
        factor_set: from ``choose_factor_set``; required for longrope, and refused for other kinds.
        seq_len: dynamic only: the length in tokens that the sequence is planned to reach. None, and any length up to
            ``original_context``, leave the base as it is.
    """
    remedy = "Pass what choose_factor_set gives"
    if spec.kind == "longrope":
        check(factor_set in ("short", "long"), f"factor_set {factor_set!r}", "longrope is short or long", remedy)
    else:
        check(factor_set is None, f"factor_set {factor_set!r}", f"RoPE kind {spec.kind!r} has one set", remedy)
    check(seq_len is None or spec.kind == "dynamic", f"seq_len {seq_len}", f"{spec.kind!r} ignores it", "Leave it out")
    # NumPy 1 divides by an int above 2^63 into an array of objects
    inverse = np.asarray(spec.scaling.frequencies(spec, factor_set, seq_len), dtype=np.float64)
    return inverse if spec.frequency_divisors is None else inverse / np.array(spec.frequency_divisors, dtype=np.float64)


def attention_factor(spec: RopeSpec) -> float:
    """The factor on cos and sin: as given, else derived (yarn, longrope), else 1."""
    given = spec.scaling.attention_factor
    return float(given) if given is not None else spec.scaling.derived_attention_factor()


def rope_tables(
    spec: RopeSpec, max_positions: int, *, factor_set: FactorSet | None = None, seq_len: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of every angle, times the attention factor: float32 [max_positions, rotary_dim // 2] each.

    Both are computed in float64 and rounded once. Up to position 2^17 the error is at most half a unit in the last
    place plus 1e-10.
    """
    inverse = inverse_frequencies(spec, factor_set=factor_set, seq_len=seq_len)
    scale = attention_factor(spec)
    cos, sin = (np.empty((max_positions, len(inverse)), dtype=np.float32) for _ in range(2))
    for start in range(0, max_positions, 4096):  # keeps the float64 intermediates small
        positions = np.arange(start, min(start + 4096, max_positions), dtype=np.float64)
        angles = positions[:, None] * inverse
        cos[start : start + 4096], sin[start : start + 4096] = np.cos(angles) * scale, np.sin(angles) * scale
    return cos, sin
