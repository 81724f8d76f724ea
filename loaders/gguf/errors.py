"""Errors of the GGUF reader, and suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from rooflama.kernels.errors import RooflamaError

MOST_NAMES = 1000  # a 2 MiB file can hold 65,000 similar names, and comparing them takes seconds


def close_names(name: str, names: Collection[str]) -> list[str]:
    """Up to three of ``names`` similar to ``name``; none if there are more than MOST_NAMES."""
    return difflib.get_close_matches(name, names) if len(names) <= MOST_NAMES else []


class GGUFError(RooflamaError, ValueError):
    """A file that is not GGUF, or breaks a rule of the format.

    The message starts with the attributes ``path``, ``offset`` (the byte at fault, or None) and ``reading`` (the key,
    tensor or part being read).
    """

    def __init__(
        self, found: str, *, rule: str, remedy: str, path: str, offset: int | None = None, reading: str | None = None
    ):
        self.path, self.offset, self.reading = path, offset, reading
        place = path
        if offset is not None:
            place += f", byte {offset}"
        if reading is not None:
            place += f", {reading}"
        RooflamaError.__init__(self, f"{place}: {found}", rule=rule, remedy=remedy)


class MissingKeyError(GGUFError, KeyError):
    """A metadata key that is not in the file."""

    __str__ = Exception.__str__  # KeyError's would quote the message
