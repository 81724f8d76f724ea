"""The command ``rooflama roofline``: how fast every kernel was measured, as a picture or a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import note


def roofline(
    out: Annotated[Path | None, typer.Option(help="the picture's file; roofline.svg by default")] = None,
    text: Annotated[bool, typer.Option("--text", help="print a table instead of drawing")] = False,
) -> None:
    """Draw how close each kernel came to the roofline.

    The picture is an SVG; it also shows the peers that were measured in the same run.

    Into a pipe or a file, without --out, the figures are printed as a table.
    """
    from ..roofline import measurements, save_picture, table

    cases = measurements()
    if text or (out is None and not sys.stdout.isatty()):
        print(table(cases), end="")
        return
    path = out or Path("roofline.svg")
    save_picture(cases, path)
    note(f"{path} shows {len(cases)} measured cases; --text prints them")
