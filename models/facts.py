"""Rows of (label, value) as a table for terminals, and as one for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rich.table import Table
from rich.text import Text

Rows = Iterable[tuple[str, str]]


def fact_table(rows: Rows) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value))
    return table


def fact_html(rows: Rows) -> str:
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows)
    return f"<table style='text-align:left'>{cells}</table>"
