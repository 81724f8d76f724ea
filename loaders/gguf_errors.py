"""The one error of the GGUF reader."""

from __future__ import annotations

from rooflama.kernels.errors import RooflamaError


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
