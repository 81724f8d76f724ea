"""Strict access to a checkpoint's hyperparameters: every value is checked, and every key must be read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from rooflama.loaders.gguf.metadata import place

from .errors import ConfigError

_REQUIRED: Any = object()
LARGEST_INTEGER = 2**31 - 1
DAMAGED = "The file is damaged or was converted wrongly"

NEUTRAL = {"logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "attention.causal": True}
"""Keys of some architectures -> the value that asks for what every decoder does."""


class Hyperparameters:
    """The keys ``<architecture>.*`` of a checkpoint. ``refuse_unread`` raises for those that were never read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata = metadata
        self.architecture = architecture
        self._read: set[str] = set()

    def _get(self, key: str, default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        self._read.add(full)
        if full in self.metadata:
            return self.metadata[full]
        if default is _REQUIRED:
            rule = "the model's shape depends on it and has no default"
            self.refuse(key, f"{full} is missing", rule, "Convert the checkpoint again with a current converter")
        return default

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = LARGEST_INTEGER) -> int:
        """A whole number from ``minimum`` to ``maximum``, or an array of equal ones, one per layer."""
        value = self._get(key, default)
        entries = list(value) if isinstance(value, np.ndarray | list | tuple) else [value]
        for entry in entries:
            if not _is_number(entry) or not math.isfinite(entry) or int(entry) != entry or entry < minimum:
                self._refuse_value(key, value, f"must be a whole number >= {minimum}", DAMAGED)
            if entry > maximum:
                self._refuse_value(key, value, f"must be at most {maximum}", DAMAGED)
        if len({int(entry) for entry in entries}) != 1:
            self._refuse_value(
                key, value, "layers of different shapes are not supported", "Use a model with equal layers"
            )
        return int(entries[0])

    def real(self, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> Any:
        """A finite float, above 0 if ``positive``; the default is returned as it is."""
        value = self._get(key, default)
        if self.has(key) and (not _is_number(value) or not math.isfinite(value) or (positive and value <= 0)):
            self._refuse_value(key, value, "must be a finite number" + " > 0" * positive, DAMAGED)
        return float(value) if self.has(key) else value

    def booleans(self, key: str, default: tuple[bool, ...], *, length: int) -> tuple[bool, ...]:
        """An array of ``length`` booleans, one per layer."""
        value = self._get(key, default)
        entries = list(value) if isinstance(value, np.ndarray | list | tuple) else []
        if len(entries) != length or not all(isinstance(entry, bool | np.bool_) for entry in entries):
            self._refuse_value(key, value, f"must be {length} booleans, one for each layer", DAMAGED)
        return tuple(bool(entry) for entry in entries)

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A mapping, which only a loader can put there; None if there is none."""
        value = self._get(key, None)
        if value is not None and not isinstance(value, Mapping):
            self._refuse_value(key, value, "must be a mapping", DAMAGED)
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not None and not isinstance(value, str):
            self._refuse_value(key, value, "must be a string", DAMAGED)
        return value

    def refuse(self, key: str, found: str, rule: str, remedy: str) -> NoReturn:
        """Raise ConfigError for the value of ``key``, naming the file and the byte if the metadata has them."""
        where = place(self.metadata, f"{self.architecture}.{key}")
        raise ConfigError(where + found, rule=rule, remedy=remedy)

    def _refuse_value(self, key: str, value: Any, rule: str, remedy: str) -> NoReturn:
        self.refuse(key, f"{self.architecture}.{key} = {value!r}", rule, remedy)

    def refuse_unread(self, harmless: Collection[str] = ()) -> None:
        """Raise ConfigError for a key of this architecture that was never read, since it may change the result.

        Exempt are the keys in ``harmless``, and those in ``NEUTRAL`` that hold the value given there.
        """
        prefix = f"{self.architecture}."
        neutral = {key for key, value in NEUTRAL.items() if np.array_equal(self.metadata.get(prefix + key, ""), value)}
        known = self._read | {prefix + key for key in (*harmless, *neutral)}
        unread = sorted(key for key in self.metadata if key.startswith(prefix) and key not in known)
        if unread:
            self.refuse(
                unread[0].removeprefix(prefix),
                ", ".join(f"{key} = {self.metadata[key]!r}" for key in unread),
                f"the {self.architecture} adapter does not know what that changes, and drops nothing silently",
                "Teach the adapter the key, or report the checkpoint",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)
