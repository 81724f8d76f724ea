"""Output of the commands. No encoding stops it, and piped output is not cut to a terminal's width."""

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
    """Replace characters that the terminal's encoding lacks by "?", instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_warnings_as_notes() -> None:
    """Show a warning as one line on standard error, without the place in the code."""
    warnings.showwarning = lambda message, *_, **__: note(str(message))


def console() -> Console:
    """Standard output, as wide as the terminal or COLUMNS; in a pipe or a file, lines are not wrapped."""
    bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if bounded else UNBOUNDED)


def note(text: str) -> None:
    _errors.print("[yellow]note:[/yellow]", escape(text))


def error(text: str) -> None:
    _errors.print("[red]error:[/red]", escape(text))


def aside(text: str) -> None:
    """What belongs to an answer and is none of it, on standard error."""
    _errors.print(f"[dim]{escape(text)}[/dim]")
