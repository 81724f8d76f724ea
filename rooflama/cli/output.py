"""Where the commands write: no encoding stops them, and what is piped is not cut to a terminal's width."""

from __future__ import annotations

import io
import os
import sys
import warnings

from rich.console import Console
from rich.markup import escape

UNBOUNDED = 100_000  # columns: wider than any line of a table

_errors = Console(stderr=True, soft_wrap=True, highlight=False)


def use_any_encoding() -> None:
    """Let characters that the terminal's encoding lacks come out as "?" instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_warnings_as_notes() -> None:
    """Warnings become one line on standard error, without the place in the code."""
    warnings.showwarning = lambda message, *_, **__: note(str(message))


def console() -> Console:
    """Standard output: as wide as the terminal, or COLUMNS; into a pipe or a file, lines are as long as they are."""
    bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if bounded else UNBOUNDED)


def note(text: str) -> None:
    _errors.print("[yellow]note:[/yellow]", escape(text))


def error(text: str) -> None:
    _errors.print("[red]error:[/red]", escape(text))


def aside(text: str) -> None:
    """What belongs to an answer and is none of it, on standard error."""
    _errors.print(f"[dim]{escape(text)}[/dim]")
