"""Draw the picture of docs/PERFORMANCE.md from its measurements: python docs/site/performance.py"""

from __future__ import annotations

import csv
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rooflama.roofline import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "benchmarks" / "results" / "long_context.csv"
COLOURS = {"Q4_K_M": "#4878a8", "BF16": "#e08a1e"}
MARKS = {"bfloat16": "o", "int8": "s"}
PANELS = {"chunk": "ms per chunk of 2,048 prompt tokens", "token": "ms per decoded token"}


def draw(rows: list[dict[str, str]]) -> Figure:
    """Measured times against the tokens in the cache, a panel for chunks and one for tokens."""
    figure = Figure(figsize=(8.6, 3.8), facecolor="white", layout="constrained")
    figure.suptitle("131,072 tokens of one sequence, Llama-3-8B's shape, one GPU", fontsize=12)
    for axes, (what, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        of_panel = [row for row in rows if row["what"] == what]
        for (weights, pages), group in groupby(of_panel, lambda row: (row["weights"], row["pages"])):
            line = list(group)
            depths = [int(row["depth"]) / 1024 for row in line]
            times = [float(row["ms"]) for row in line]
            least = [float(row["ms"]) * float(row["of_roofline"]) for row in line]
            style = {"color": COLOURS[weights], "marker": MARKS[pages], "markersize": 4 if what == "token" else 2}
            axes.plot(depths, times, label=f"{weights} weights, {pages} pages", **style)
            axes.plot(depths, least, color=COLOURS[weights], linewidth=0.8, linestyle="--" if pages == "int8" else ":")
        axes.set_title(title)
        axes.set_xlabel("thousands (1,024) of tokens in the cache")
        axes.set_xlim(0, 132)
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(0, 129, 16))
        axes.spines[["top", "right"]].set_visible(False)
        if what == "chunk":
            axes.legend(frameon=False)
    foot = "Dotted, with bfloat16 pages, and dashed, with int8 pages: the roofline. " + "; ".join(
        dict.fromkeys(
            f"{row['gpu']}, torch {row['torch']}, Triton {row['triton']}, {row['commit']}, {row['date']}"
            for row in rows
        )
    )
    figure.supxlabel(foot, fontsize=7, color="#555555")
    return figure


def save(folder: Path) -> None:
    with MEASUREMENTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        draw(rows).savefig(folder / "long_context.svg", metadata={"Date": None})


if __name__ == "__main__":
    save(ROOT / "docs")
