"""How objects show themselves: pairs of label and value as a table, in terminals and in notebooks.

HTML takes the colours of the page around it, so it reads in light and in dark themes. What is coloured is translucent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Rows = Iterable[tuple[str, str]]

# Okabe and Ito's palette, which most colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")


class Facts:
    """An object that shows ``rows()`` as a table: rich prints it, and Jupyter displays it."""

    def rows(self) -> Rows:
        """The facts, as (label, value)."""
        raise NotImplementedError

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield fact_table(self.rows())

    def _repr_html_(self) -> str:
        return fact_html(self.rows())


def fact_table(rows: Rows) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value, overflow="fold"))  # a path is shown to its end
    return table


def fact_html(rows: Rows) -> str:
    cells = "".join(element("tr", element("th", label), element("td", value)) for label, value in rows)
    return f"<table style='text-align:left;white-space:pre-wrap'>{cells}</table>"


class Html(str):
    """Text that is HTML already."""


def element(tag: str, *children: str, **attributes: object) -> Html:
    """``<tag attributes>children</tag>``. Text is escaped, in children and attributes; ``Html`` children are not."""
    within = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    listed = "".join(f' {name}="{escape(str(value), quote=True)}"' for name, value in attributes.items())
    return Html(f"<{tag}{listed}>{within}</{tag}>")


def tint(colour: str, share: float) -> str:
    """A CSS background of ``colour`` (#rrggbb), invisible at 0 and half covering at 1: text on it stays readable."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"background:rgba({red},{green},{blue},{0.5 * min(max(share, 0.0), 1.0):.2f})"
