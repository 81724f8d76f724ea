"""The metadata of a GGUF file as a mapping. Errors about a value name the file, the key and the byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from .errors import GGUFError, MissingKeyError, close_names
from .types import Value


class Metadata(Mapping[str, Value]):
    """key -> int, float, bool, str, read-only NumPy array (native byte order) or StringArray."""

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

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer at ``key``, or ``default`` if the key is absent.

        Raises:
            MissingKeyError: the key is absent and there is no default.
            GGUFError: the value is not an integer.
        """
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, f"a value of type {type(value).__name__}", "the value must be a whole number")
        return value

    def refuse(self, key: str, found: str, rule: str, remedy: str | None = None) -> NoReturn:
        """Raise GGUFError about the value of ``key``, with its place in the file."""
        raise GGUFError(
            found,
            rule=rule,
            remedy=remedy or "The file is damaged or was converted wrongly: convert or download it again",
            path=self._path,
            offset=self._offsets.get(key),
            reading=f"key {key!r}",
        )


def place(metadata: Mapping[str, Any], key: str) -> str:
    """The start of an error about ``key``: "PATH, byte N: " for the metadata of a GGUF file, "" for any other."""
    if not isinstance(metadata, Metadata):
        return ""
    offset = metadata._offsets.get(key)
    return f"{metadata._path}: " if offset is None else f"{metadata._path}, byte {offset}: "
