"""The errors of the GGUF reader, and the names that one suggests."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from rooflama.kernels.errors import RooflamaError

MOST_NAMES = 1000  # a file of 2 MiB can hold 65,000 that are alike, and comparing them takes seconds


def close_names(name: str, names: Collection[str]) -> list[str]:
    """Up to three of ``names`` that ``name`` may have been meant for; none where there are more than MOST_NAMES."""
    return difflib.get_close_matches(name, names) if len(names) <= MOST_NAMES else []


class GGUFError(RooflamaError, ValueError):
    """A file that is not GGUF, or breaks one of its rules.

    ``path``, ``offset`` (byte in that file, None where no byte is at fault) and ``reading`` (the key, tensor or part
    being read) are attributes, and stand at the head of the message.
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
    """A metadata key that the file does not have."""

    __str__ = Exception.__str__  # KeyError's would quote the message
