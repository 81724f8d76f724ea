"""Runs commands in this process, which has already imported torch."""

from __future__ import annotations

import io
import sys
import warnings
from typing import NamedTuple

import pytest

from rooflama.cli import main


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


class _Input(io.TextIOWrapper):
    """Standard input, a terminal or a pipe."""

    def __init__(self, data: bytes, terminal: bool):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def rooflama(*arguments: str, stdin: str | bytes = b"", terminal: bool = False, encoding: str = "utf-8") -> Result:
    """What ``rooflama ARGUMENTS`` does.

    Args:
        stdin: what is typed or piped in.
        terminal: whether standard input is a terminal. The outputs are pipes.
        encoding: of both outputs, whose error handler is Python's strictest.
    """
    outputs = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    data = stdin.encode() if isinstance(stdin, str) else stdin
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["rooflama", *arguments])
        patch.setattr(sys, "stdin", _Input(data, terminal))
        patch.setattr(sys, "stdout", outputs[0])
        patch.setattr(sys, "stderr", outputs[1])
        with pytest.raises(SystemExit) as ended:
            main()
        for output in outputs:
            output.flush()
    texts = [output.buffer.getvalue().decode(encoding) for output in outputs]
    return Result(int(ended.value.code or 0), *texts)
