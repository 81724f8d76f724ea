"""Draw the picture of docs/TENSOR_PARALLEL.md from the code that cuts: python docs/site/tensor_parallel.py"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rooflama
from rooflama.loaders.opening import open_headers
from rooflama.models import CheckpointReader, ModelConfig
from rooflama.models.share import Share
from rooflama.planning import adapter_of
from rooflama.roofline import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ("#4878a8", "#e08a1e", "#6aa56a")
RANKS = 3
SCALE = 1 / 1200  # inches of a row or column
WIDTH = 576 * SCALE  # the model's hidden size


def demo_config() -> ModelConfig:
    with open_headers(rooflama.demo_checkpoint()) as checkpoint:
        return adapter_of(checkpoint).read_config(CheckpointReader(checkpoint))


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """(first, count) of each run of neighbouring rows."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]


def draw_matrix(
    axes: Axes, x: float, name: str, note: str, total: int, of_ranks: Iterable[list[tuple[int, int]]], *, across: bool
) -> None:
    """A matrix whose rows, or whose columns if ``across``, are cut: each rank's in its colour."""
    length = total * SCALE
    for rank, parts in enumerate(of_ranks):
        for first, count in parts:
            start, size = first * SCALE, count * SCALE
            place = (x + start, -WIDTH) if across else (x, -start - size)
            shape = (size, WIDTH) if across else (WIDTH, size)
            axes.add_patch(matplotlib.patches.Rectangle(place, *shape, fc=COLOURS[rank], ec="white", lw=0.6))
    width = length if across else WIDTH
    axes.text(x + width / 2, 0.24, name, ha="center", fontweight="bold")
    axes.text(x + width / 2, 0.08, note, ha="center")


def draw(config: ModelConfig) -> Figure:
    shares = [Share(rank, RANKS) for rank in range(RANKS)]
    inner, q_size = config.intermediate_size, config.num_heads * config.head_dim
    qkv = [runs(share.qkv_rows(config)) for share in shares]
    gate_up = [runs(share.gate_up_rows(config)) for share in shares]

    def columns(total: int) -> list[list[tuple[int, int]]]:
        return [[(part.start, part.stop - part.start)] for part in (share.part(total) for share in shares)]

    total = q_size + 2 * config.num_kv_heads * config.head_dim
    figure = Figure(figsize=(8.6, 3.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.3, 8.3), ylim=(-2.95, 0.95))
    axes.set_axis_off()
    axes.text(-0.1, 0.7, f"One layer of SmolLM2-135M on {RANKS} ranks, to scale", fontsize=12)
    draw_matrix(axes, 0.1, "q, k, v", f"{total} rows", total, qkv, across=False)
    draw_matrix(axes, 1.75, "attention's output", f"{q_size} columns", q_size, columns(q_size), across=True)
    draw_matrix(axes, 3.85, "gate, up", f"{2 * inner} rows", 2 * inner, gate_up, across=False)
    draw_matrix(axes, 5.6, "down", f"{inner} columns", inner, columns(inner), across=True)
    for first, count, name in ((0, q_size, "q"), (q_size, total - q_size, "k, v")):
        axes.text(-0.02, -(first + count / 2) * SCALE, name, ha="right", va="center")
    for half, name in enumerate(("gate", "up")):
        axes.text(3.73, -(half + 0.5) * inner * SCALE, name, ha="right", va="center")
    for x in (1.75 + q_size * SCALE + 0.12, 5.6 + inner * SCALE + 0.12):
        axes.text(x, -WIDTH / 2, "sum over ranks\n+ residual", va="center")
    for rank, share in enumerate(shares):
        mine = share.of(config)
        heads = f"{mine.num_heads} query heads, {mine.num_kv_heads} key/value head"
        said = f"rank {rank}: {heads}, width {mine.intermediate_size}"
        axes.text(4.75, -1.5 - 0.3 * rank, said, color=COLOURS[rank], fontweight="bold")
    return figure


def save(folder: Path) -> None:
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        draw(demo_config()).savefig(folder / "tensor_parallel.svg", metadata={"Date": None})


if __name__ == "__main__":
    save(ROOT / "docs")
