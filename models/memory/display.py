"""A memory plan as a table for terminals, and as a stacked bar with its table for notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import ceil, floor

from rich.table import Table
from rich.text import Text

from rooflama.kernels.facts import fact_html, fact_table

from .amounts import count, size
from .budget import Budget
from .remedies import remedies

# One colour per group: Okabe and Ito's palette, which most colour-blind readers can tell apart, and so can print.
COLOURS = {
    "weights": "#0072b2",
    "keys and values": "#e69f00",
    "tables": "#999999",
    "workspace": "#009e73",
    "CUDA graph": "#cc79a7",
    "device": "#d55e00",
}


def verdict(plan: Budget) -> list[tuple[str, str]]:
    """(label, value): the total, its bounds, and what would fit."""
    rows = [("total", size(plan.total_bytes, ceil))]
    if plan.limit is not None:
        rows.append(("limit", size(plan.limit, floor)))
    if plan.free_bytes is not None:
        rows.append(("free on the device", size(plan.free_bytes, floor)))
    headroom = plan.headroom_bytes
    if headroom is not None:
        most, longest = plan.most_sequences(), plan.largest_context()
        more = " or more" if most == plan.MOST_SEQUENCES else ""
        rows.append(("headroom", size(headroom, floor) if headroom >= 0 else f"none: {size(-headroom, ceil)} too much"))
        rows.append((f"largest context for {count(plan.sequences, 'sequence')}", count(longest, "token")))
        rows.append((f"most sequences of {count(plan.context, 'token')}", f"{most:,}{more}"))
    rows += [("what would fit", remedy) for remedy in remedies(plan)]
    return rows


def title(plan: Budget) -> str:
    kv_dtype, dtype = (str(d).removeprefix("torch.") for d in (plan.kv_dtype, plan.dtype))
    rank = f", one of {plan.ranks} ranks" if plan.ranks > 1 else ""
    return (
        f"{plan.config.name}{rank}: {count(plan.sequences, 'sequence')} of {count(plan.context, 'token')}, "
        f"keys and values in {kv_dtype}, activations in {dtype}, on {plan.target.kind}"
    )


def rich_lines(plan: Budget) -> Iterator[Table | Text]:
    yield Text(title(plan), style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("group")
    table.add_column("term")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("how")
    shown = None
    for line in plan.lines:
        group = "" if line.group == shown else line.group
        shown = line.group
        share = f"{line.nbytes / plan.total_bytes:.1%}"
        table.add_row(Text(group, style="bold"), line.name, size(line.nbytes), share, Text(line.formula, style="dim"))
    yield table
    yield fact_table(verdict(plan))


def html(plan: Budget) -> str:
    """A stacked bar, to the scale of the limit (or the total, if larger), over a table of the lines."""
    bound = plan.limit if plan.limit is not None else plan.free_bytes
    scale = max(plan.total_bytes, bound or 0)
    bars, x = [], 0.0
    for group, colour in COLOURS.items():
        nbytes = plan.bytes_of(group)  # type: ignore[arg-type]
        width = 1000 * nbytes / scale
        if nbytes:
            tip = f"{group}: {size(nbytes)}"
            bars.append(
                f"<rect x='{x:.2f}' y='0' width='{width:.2f}' height='36' fill='{colour}'><title>{tip}</title></rect>"
            )
        x += width
    if bound is not None:
        mark = min(998.0, 1000 * bound / scale)
        bars.append(
            f"<line x1='{mark:.2f}' x2='{mark:.2f}' y1='0' y2='44' stroke='currentColor' stroke-width='3'>"
            f"<title>{size(bound)} available</title></line>"
        )
    rows = "".join(
        f"<tr><td style='border-left:.6em solid {COLOURS[line.group]}'>{escape(line.group)}</td>"
        f"<td>{escape(line.name)}</td><td style='text-align:right'>{size(line.nbytes)}</td>"
        f"<td style='text-align:right'>{line.nbytes / plan.total_bytes:.1%}</td><td>{escape(line.formula)}</td></tr>"
        for line in plan.lines
    )
    return (
        f"<p><b>{escape(title(plan))}</b></p>"
        "<svg viewBox='0 0 1000 44' width='100%' style='max-width:60em' role='img' "
        f"aria-label='memory by group, {size(plan.total_bytes)} in all'>{''.join(bars)}</svg>"
        f"<table style='text-align:left'>{rows}</table>{fact_html(verdict(plan))}"
    )
