"""Strict access to a checkpoint's hyperparameters: typed, range-checked, and nothing left unread by accident."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from rooflama.kernels import RooflamaError


class ConfigError(RooflamaError, ValueError):
    """A checkpoint's metadata or tensors do not describe a model that can be run right."""


_REQUIRED: Any = object()


class Hyperparameters:
    """The keys ``<architecture>.*`` of a checkpoint. Remembers which were read, so that the rest can be refused."""

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
            raise ConfigError(
                f"{full} is missing",
                rule="the model's shape depends on it and has no default",
                remedy="Convert the checkpoint again with a current converter",
            )
        return default

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1) -> int:
        """A whole number >= ``minimum``. An array, one entry a layer, counts if all its entries are equal."""
        value = self._get(key, default)
        if not isinstance(value, str | bytes) and hasattr(value, "__len__"):
            distinct = sorted({int(v) for v in value})
            if len(distinct) != 1:
                self._refuse(
                    key, value, "layers of different shapes are not supported", "Use a model with equal layers"
                )
            value = distinct[0]
        if isinstance(value, bool) or int(value) != value or value < minimum:
            self._refuse(
                key, value, f"must be a whole number >= {minimum}", "The file is damaged or was converted wrongly"
            )
        return int(value)

    def real(self, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> float:
        """A finite float, > 0 unless ``positive`` is False."""
        value = self._get(key, default)
        if isinstance(value, bool | str) or not math.isfinite(value) or (positive and value <= 0):
            kind = "finite and > 0" if positive else "finite"
            self._refuse(key, value, f"must be {kind}", "The file is damaged or was converted wrongly")
        return float(value)

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not None and not isinstance(value, str):
            self._refuse(key, value, "must be a string", "The file is damaged or was converted wrongly")
        return value

    def _refuse(self, key: str, value: Any, rule: str, remedy: str) -> None:
        raise ConfigError(f"{self.architecture}.{key} = {value!r}", rule=rule, remedy=remedy)

    def refuse_unread(self, harmless: Collection[str] = ()) -> None:
        """Raise if a key of this architecture was never read: it may change the result, and would be dropped."""
        prefix = f"{self.architecture}."
        known = self._read | {prefix + key for key in harmless}
        unread = sorted(key for key in self.metadata if key.startswith(prefix) and key not in known)
        if unread:
            raise ConfigError(
                ", ".join(f"{key} = {self.metadata[key]!r}" for key in unread),
                rule=f"the {self.architecture} adapter does not know what that changes, and drops nothing silently",
                remedy="Teach the adapter the key, or report the checkpoint",
            )
