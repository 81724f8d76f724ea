"""How much of the roofline each kernel reaches, and its peers in the same run: one picture, or a table.

The figures are those of the kernels' cards, so a wheel draws the same picture as the repository. A case that compares
only parts of rooflama with each other is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rooflama.kernels import RooflamaError

from .kernel_card import CARDS, KernelCard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "rooflama"
COLOURS = {OURS: "#4878a8", "torch": "#d1495b", "torch bf16": "#222222", "torch SDPA": "#e08a1e"}
OTHER_COLOUR = "#7b4b94"

# (kernel, pattern of its cases, heading): a case stands under the first heading whose pattern matches all of it, or
# else under its kernel's name. The pattern's groups are the case's label there.
HEADINGS = (
    ("quantized_matmul", r"(\w+) \[28672, 4096\] tokens=1", "quantized_matmul [28672, 4096], 1 token"),
    ("quantized_matmul", r"(\w+) \[4096, 14336\] tokens=1", "quantized_matmul [4096, 14336], 1 token"),
    ("quantized_matmul", r"(\w+) \[6144, 4096\] tokens=1", "quantized_matmul [6144, 4096], 1 token"),
    ("quantized_matmul", r"(\w+) \[4096, 4096\] tokens=1", "quantized_matmul [4096, 4096], 1 token"),
    ("quantized_matmul", r"(\w+) \[128256, 4096\] tokens=1", "quantized_matmul [128256, 4096], 1 token"),
    ("quantized_matmul", r"(\w+) \[28672, 4096\] (tokens=\d+)", "quantized_matmul [28672, 4096]"),
    ("sampling", r"temperature, (top-k, top-p, min-p) (\[.*\])", "sampling"),
)
COLUMNS = 3
ROW, HEADING_ROWS = 0.15, 2.2  # inches per case; a heading takes the height of so many cases
WIDTH, HEADER, FOOTER = 12.0, 0.6, 0.7  # inches
MARGIN = 0.01  # of the width
FARTHEST = 1.3  # the axis' end: more than any fraction, which exceeds 1 where the memory rate was measured too low
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rooflama",
    "font.family": "DejaVu Sans",
    "font.size": 8,
}


@dataclass(frozen=True)
class Measured:
    """One case: the fraction of the roofline and the microseconds of each implementation, all of one run."""

    kernel: str
    case: str
    fractions: dict[str, float]
    microseconds: dict[str, float]
    run: str

    @property
    def heading_and_label(self) -> tuple[str, str]:
        for kernel, pattern, heading in HEADINGS:
            if kernel == self.kernel and (match := re.fullmatch(pattern, self.case)):
                return heading, " ".join(match.groups())
        return self.kernel, self.case

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.microseconds if name != OURS]
        return min(peers, key=self.microseconds.__getitem__, default=None)


def measurements() -> list[Measured]:
    """Every committed case that measures a kernel of rooflama as users call it."""
    found: dict[tuple[str, str, str], Measured] = {}
    for kernel in CARDS:
        for row in KernelCard(kernel).tables()["measured"]:
            key = (kernel, row["case"], row["on"])
            case = found.setdefault(key, Measured(kernel, row["case"], {}, {}, row["on"]))
            case.fractions[row["implementation"]] = float(row["of roofline"].rstrip("%")) / 100
            case.microseconds[row["implementation"]] = float(row["us"])
    return [case for case in found.values() if OURS in case.fractions]


def table(cases: Sequence[Measured]) -> str:
    """One line per case: ours, and the fastest peer of the same run. Runs and unmeasured kernels are named below."""
    lines = [("kernel", "case", "us", "of roofline", "best peer", "us", "of roofline", "run")]
    runs = _runs(cases)
    for case in cases:
        figures = [(f"{case.microseconds[n]:.2f}", f"{case.fractions[n]:.0%}") for n in (OURS, case.best_peer) if n]
        ours, peer = (*figures, ("", ""))[:2]
        run = str(runs.index(case.run) + 1)
        lines.append((case.kernel, case.case, *ours, case.best_peer or "none", *peer, run))
    columns = []
    for place, column in enumerate(zip(*lines, strict=True)):
        align = str.rjust if place in (2, 3, 5, 6) else str.ljust
        width = max(map(len, column))
        columns.append([align(cell, width) for cell in column])
    aligned = ["  ".join(line) for line in zip(*columns, strict=True)]
    named = [f"run {number}: {run}" for number, run in enumerate(runs, start=1)]
    named += _unmeasured(cases)
    return "\n".join(line.rstrip() for line in [*aligned, "", *named]) + "\n"


def save_picture(cases: Sequence[Measured], path: Path) -> None:
    """Write the picture as SVG, with the table as its description.

    The same figures give the same bytes with the same version of matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RooflamaError(
            "matplotlib is not installed",
            rule="the picture is drawn with it",
            remedy="Run: pip install 'rooflama[bench]', or ask for the table: rooflama roofline --text",
        ) from error
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        drawn = io.StringIO()
        _draw(cases).savefig(drawn, format="svg", metadata={"Date": None, "Description": table(cases)})
    try:
        path.write_text(drawn.getvalue(), encoding="utf-8")
    except OSError as error:
        raise RooflamaError(
            f"{path} cannot be written ({error.strerror})",
            rule="the picture is written as a file",
            remedy="Name another with --out",
        ) from error


def _draw(cases: Sequence[Measured]) -> Figure:
    from matplotlib.figure import Figure

    columns = _columns(cases)
    rows = max(sum(HEADING_ROWS + len(panel) for panel in column.values()) for column in columns)
    height = HEADER + FOOTER + rows * ROW
    figure = Figure(figsize=(WIDTH, height))
    for number, column in enumerate(columns):
        top = height - HEADER
        for heading, panel in column.items():
            top -= HEADING_ROWS * ROW
            extent = len(panel) * ROW
            left = (number + 0.44) * WIDTH / COLUMNS
            box = (left / WIDTH, (top - extent) / height, 0.53 / COLUMNS, extent / height)
            _draw_panel(figure.add_axes(box), panel)
            x = MARGIN + number / COLUMNS
            figure.text(x, (top + 0.4 * ROW) / height, heading, fontweight="bold")
            top -= extent
    notes = [
        "100% (dashed) is the least time of a case: its bytes at the memory rate, or its operations at the matrix rate "
        "where that is longer. Bar: rooflama. Mark: a peer in the same run, against the same time.",
    ]
    if any(fraction > 1 for case in cases for fraction in case.fractions.values()):
        notes.append("More than 100%: the rate of that run was measured too low (benchmarks/results/README.md).")
    figure.text(MARGIN, 1 - 0.2 / height, "Fraction of the roofline per kernel and shape", fontsize=12, va="center")
    for line, note in enumerate(notes):
        figure.text(MARGIN, 1 - (0.45 + ROW * line) / height, note, va="center")
    for place, name in enumerate(dict.fromkeys(name for case in cases for name in case.fractions)):
        x = MARGIN + 0.09 * place
        figure.text(x, 0.4 / height, "■" if name == OURS else "┃", color=_colour(name), va="center")
        figure.text(x + 0.012, 0.4 / height, name, va="center")
    foot = ". ".join(["Measured on " + "; ".join(_runs(cases)), *_unmeasured(cases)])
    figure.text(MARGIN, 0.18 / height, foot, va="center", color="#555555")
    return figure


def _draw_panel(axes: Axes, panel: Sequence[tuple[str, Measured]]) -> None:
    places = range(len(panel))
    axes.barh(places, [case.fractions[OURS] for _, case in panel], height=0.7, color=_colour(OURS))
    for place, (_, case) in zip(places, panel, strict=True):
        for name, fraction in case.fractions.items():
            if name != OURS:
                axes.plot([fraction] * 2, [place - 0.45, place + 0.45], color=_colour(name), linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [label for label, _ in panel], fontsize=7)
    axes.set_ylim(len(panel) - 0.5, -0.5)
    axes.set_xlim(0, FARTHEST)
    axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=6)
    axes.tick_params(length=0, pad=2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _columns(cases: Iterable[Measured]) -> list[dict[str, list[tuple[str, Measured]]]]:
    """The headings in the table's order, each with its cases and their labels, in columns of about the same height."""
    panels: dict[str, list[tuple[str, Measured]]] = {}
    for case in cases:
        heading, label = case.heading_and_label
        panels.setdefault(heading, []).append((label, case))
    total = sum(HEADING_ROWS + len(panel) for panel in panels.values())
    columns: list[dict[str, list[tuple[str, Measured]]]] = [{} for _ in range(COLUMNS)]
    above = 0.0
    for heading, panel in panels.items():
        extent = HEADING_ROWS + len(panel)
        columns[int(COLUMNS * (above + extent / 2) / total)][heading] = panel
        above += extent
    return columns


def _runs(cases: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(case.run for case in cases))


def _unmeasured(cases: Iterable[Measured]) -> list[str]:
    missing = CARDS.keys() - {case.kernel for case in cases}
    return [f"Not measured yet: {', '.join(sorted(missing))}"] if missing else []


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER_COLOUR)
