"""Reading the JSON files of a Hugging Face folder. Each holds one object, whose keys are distinct."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rooflama.kernels import RooflamaError

DAMAGED = "The file is damaged: download it again"
MOST_DIGITS = 40  # of an integer; transformers writes 10^30 for "no limit"


class HuggingFaceError(RooflamaError, ValueError):
    """A Hugging Face folder that cannot be read, or whose model is not supported."""


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn an OSError about a file of ``folder`` into a HuggingFaceError."""
    try:
        yield
    except OSError as error:
        refuse(
            Path(error.filename or folder),
            f"cannot be read ({error.strerror})",
            "the files of a Hugging Face folder must be readable",
            "Check its permissions, and that the download finished",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises HuggingFaceError if the file is missing or does not hold one object."""
    if not path.is_file():
        refuse(path, "no such file", "a Hugging Face folder holds it", "Check the path, and that the download finished")
    return parse_json(path.read_bytes(), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Like ``read_json``, but an empty object if the file is missing."""
    return read_json(path) if path.exists() else {}


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse one JSON object. Refuses repeated keys, and integers of more than MOST_DIGITS digits."""

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise ValueError("a key occurs twice")
        return mapping

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_int=whole)
    except (ValueError, RecursionError) as error:
        refuse(path, f"JSON that cannot be read ({error})", "the text is one JSON object")
    if not isinstance(parsed, dict):
        refuse(path, f"JSON of type {type(parsed).__name__}", "the text is one JSON object")
    return parsed


def refuse(path: Path, found: str, rule: str, remedy: str = DAMAGED) -> NoReturn:
    raise HuggingFaceError(f"{path}: {found}", rule=rule, remedy=remedy)
