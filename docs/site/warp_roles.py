"""Draw the picture of docs/WARP_ROLES.md from the kernel's own facts: python docs/site/warp_roles.py"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rooflama.kernels.attention_prefill_hopper_roles import ROWS
from rooflama.kernels.attention_prefill_hopper_tiles import part_widths
from rooflama.kernels.launch import TABLE
from rooflama.roofline import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIM = 128
TILES = 4  # of the time line
TENSOR_FLOPS, EXPONENTIALS = 4096, 16  # per cycle and multiprocessor of an H100
GREY, GREEN, CONSUMERS = "#eeeeee", "#6aa56a", ("#4878a8", "#e08a1e")


class Interval(NamedTuple):
    row: str
    consumer: int
    what: str
    start: float  # cycles
    length: float


def configuration() -> dict[str, int]:
    rows = next(iter(TABLE["attention_prefill_hopper"].values()))
    return next(row for row in rows if row.limits.get("head_dim", HEAD_DIM) >= HEAD_DIM).configuration


def registers() -> tuple[str, str]:
    """Per thread of a consumer and of the producer."""
    source = (ROOT / "kernels" / "attention_prefill_hopper.py").read_text(encoding="utf-8")
    return re.search(r"\[4, 1\],\s*\[(\d+), (\d+)\]", source).groups()


def intervals() -> Iterator[Interval]:
    """When the products and the exponentials of the first tiles run, at the chip's peak rates.

    A consumer issues the scores of a tile and the values of the one before when its softmax is done and it is its turn.
    It computes weights when both are done. The tensor cores take products in the order in which they are issued.
    """
    block_n = configuration()["BLOCK_N"]
    product, softmax = 2 * ROWS * block_n * HEAD_DIM / TENSOR_FLOPS, ROWS * block_n / EXPONENTIALS
    tensor_cores, done = 0.0, [0.0, 0.0]
    for tile in range(TILES):
        for consumer in (0, 1):
            start = max(tensor_cores, done[consumer])
            yield Interval("tensor cores", consumer, f"K{tile}", start, product)
            tensor_cores = start + product
            if tile > 0:
                yield Interval("tensor cores", consumer, f"V{tile - 1}", tensor_cores, product)
                tensor_cores += product
            yield Interval(f"consumer {consumer}", consumer, f"s{tile}", tensor_cores, softmax)
            done[consumer] = tensor_cores + softmax


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, title: str, note: str) -> None:
    shape = matplotlib.patches.FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", fc=GREY, ec=colour)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height - 0.13, title, ha="center", va="center", fontweight="bold", color=colour)
    axes.text(x + width / 2, y + (height - 0.25) / 2, note, ha="center", va="center", linespacing=1.4)


def draw_roles(axes: Axes) -> None:
    chosen = configuration()
    stages, block_n = chosen["STAGES"], chosen["BLOCK_N"]
    width = sum(part_widths(HEAD_DIM))
    consumer, producer = registers()
    box(
        axes,
        0.1,
        1.0,
        1.5,
        0.95,
        GREEN,
        "producer",
        f"1 warp, {producer} registers\npage numbers,\nboxes by the copy engine",
    )
    for number, y in enumerate((1.75, 0.15)):
        note = f"{ROWS} rows, 4 warps, {consumer} registers\nq in shared memory\nscores, weights, sums"
        box(axes, 6.1, y, 2.2, 0.95, CONSUMERS[number], f"consumer {number}", note)
    for name, y in (("k", 1.75), ("v", 0.25)):
        for stage in range(stages):
            cell = (3.0 + stage * 1.4 / stages, y)
            axes.add_patch(matplotlib.patches.Rectangle(cell, 1.4 / stages, 0.6, fc="white", ec="black", lw=0.8))
            axes.text(cell[0] + 0.7 / stages, y + 0.3, f"{name} {stage}", ha="center", va="center")
        axes.text(3.7, y + 0.75, f"{stages} x [{block_n}, {width}]", ha="center", va="center")
        up = 0.12 if name == "k" else -0.12
        arrow(axes, (1.7, 1.5 + up), (2.95, y + 0.4), f"{name}_full", GREEN, (2.3, 1.75 if name == "k" else 1.1))
        arrow(axes, (2.95, y + 0.1), (1.7, 1.5 + 2 * up), f"{name}_empty", "black", (2.35, 2.1 if name == "k" else 0.5))
        for number, target in enumerate((2.2, 0.6)):
            arrow(axes, (4.45, y + 0.3), (6.0, target), "", CONSUMERS[number], None)
    arrow(axes, (7.2, 1.65), (7.2, 1.2), "turns", "black", (7.55, 1.42))
    arrow(axes, (7.0, 1.2), (7.0, 1.65), "", "black", None)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str, colour: str, at: tuple | None
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour})
    if at:
        axes.text(*at, label, ha="center", va="center", color=colour)


def draw_time(axes: Axes) -> None:
    rows = ["consumer 1", "tensor cores", "consumer 0"]
    for row, consumer, what, start, length in intervals():
        axes.barh(rows.index(row), length, 0.7, start, color=CONSUMERS[consumer], ec="white")
        axes.text(start + length / 2, rows.index(row), what, ha="center", va="center", color="white")
    axes.set_yticks(range(3), rows)
    axes.set_xlabel(f"cycles at peak rates, head_dim {HEAD_DIM}: {TENSOR_FLOPS:,} FLOP, {EXPONENTIALS} exponentials")
    axes.spines[["top", "right", "left"]].set_visible(False)


def save(folder: Path) -> None:
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        figure = Figure(figsize=(8.6, 5.0), facecolor="white")
        figure.text(0.02, 0.955, "One program: who does what, and who waits for whom", fontsize=12)
        axes = figure.add_axes((0, 0.42, 1, 0.53), xlim=(0, 8.6), ylim=(0, 2.9))
        axes.set_axis_off()
        draw_roles(axes)
        figure.text(
            0.02, 0.375, "The first tiles in time: K is q.k of a tile, V is weights.v, s the weights", fontsize=12
        )
        draw_time(figure.add_axes((0.11, 0.1, 0.86, 0.25)))
        figure.savefig(folder / "warp_roles.svg", metadata={"Date": None})


if __name__ == "__main__":
    save(ROOT / "docs")
