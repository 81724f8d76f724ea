"""The metadata of a GGUF file as a mapping, with typed access whose errors name the file, the key and the byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from .errors import GGUFError, MissingKeyError, close_names
from .types import StringArray, Value

_NUMPY_KINDS = {int: "iu", float: "f", bool: "b"}


class Metadata(Mapping[str, Value]):
    """key -> int, float, bool, str, read-only NumPy array (native byte order) or StringArray.

    ``require`` and ``optional`` check the type before handing a value out. The kinds they know are int, float, bool,
    str, and list[...] of each: an array (numbers) or a StringArray. An int serves where a float is asked for. Floats
    must be finite.
    """

    def __init__(self, values: Mapping[str, Value], offsets: Mapping[str, int], path: str):
        self._values, self._offsets, self._path = values, offsets, path

    def __getitem__(self, key: str) -> Value:
        if key not in self._values:
            close = close_names(key, self._values)
            raise MissingKeyError(
                f"no key {key!r}",
                rule="the key must be in the file's metadata",
                remedy=f"Close keys are {', '.join(close)}" if close else "Convert the model again",
                path=self._path,
            )
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"Metadata({self._path}, {len(self)} keys)"

    def require(self, key: str, kind: Any, *, positive: bool = False) -> Any:
        """The value of ``key``, which must be of ``kind`` and, if ``positive``, above zero in every element.

        Raises:
            MissingKeyError: the key is absent.
            GGUFError: the value has another type, is NaN or infinite, or is not positive.
        """
        value = self[key]
        if not _is_kind(value, kind):
            name = kind.__name__ if kind in (int, float, bool, str) else str(kind)
            self.refuse(key, f"a value of type {_type_name(value)}", f"the value must be {name}")
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            bad = ~np.isfinite(value) if value.dtype.kind == "f" else np.zeros(value.shape, dtype=bool)
            if positive:
                bad |= ~(value > 0)
            if bad.any():
                worst = int(np.argmax(bad))
                rule = "every element must be finite" + (" and above zero" if positive else "")
                self.refuse(key, f"element {worst} is {value[worst]}", rule)
        elif isinstance(value, int | float) and not (math.isfinite(value) and (value > 0 or not positive)):
            self.refuse(key, f"{value}", "the value must be finite" + (" and above zero" if positive else ""))
        return float(value) if isinstance(value, int) and kind is float else value

    def optional(self, key: str, kind: Any, default: Any = None, *, positive: bool = False) -> Any:
        """``default`` where the key is absent; otherwise as ``require``."""
        return self.require(key, kind, positive=positive) if key in self else default

    def refuse(self, key: str, found: str, rule: str, remedy: str | None = None) -> NoReturn:
        """Raise GGUFError for the value of ``key``, for rules that the caller knows."""
        raise GGUFError(
            found,
            rule=rule,
            remedy=remedy or "The file is damaged or was converted wrongly: convert or download it again",
            path=self._path,
            offset=self._offsets.get(key),
            reading=f"key {key!r}",
        )


def place(metadata: Mapping[str, Any], key: str) -> str:
    """What an error about ``key`` begins with: "PATH, byte N: " if the metadata is a GGUF file's, nothing if not."""
    if not isinstance(metadata, Metadata):
        return ""
    offset = metadata._offsets.get(key)
    return f"{metadata._path}: " if offset is None else f"{metadata._path}, byte {offset}: "


def _is_kind(value: Value, kind: Any) -> bool:
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == list[str]:
        return isinstance(value, StringArray)
    for element, codes in _NUMPY_KINDS.items():
        if kind == list[element]:  # type: ignore[valid-type]
            return isinstance(value, np.ndarray) and value.dtype.kind in codes
    raise TypeError(f"kind {kind!r} is not one of int, float, bool, str or a list[...] of them")


def _type_name(value: Value) -> str:
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype}"
    return "array of str" if isinstance(value, StringArray) else type(value).__name__
