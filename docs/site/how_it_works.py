"""Draw the pictures of docs/HOW_IT_WORKS.md from the code: python docs/site/how_it_works.py"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.patches
import numpy as np
from matplotlib.figure import Figure

import rooflama
from rooflama.kernels.kernel import KERNELS
from rooflama.roofline import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "rooflama": "load, Model, plan, trace, check, command line",
    "models": "families, a forward pass, K/V pages, serving",
    "loaders": "files to tensors and tokenizers, the device boundary",
    "kernels": "functions on tensors, each with a NumPy definition",
}
BLUE, ORANGE, GREY = "#4878a8", "#e08a1e", "#eeeeee"
CONTEXTS = 2 ** np.arange(8, 14)


def arrows() -> set[tuple[str, str]]:
    """(package, package that it imports), of the repository's four."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("rooflama."):
                    found.add((room, node.module.split(".")[1]))
    return {(room, other) for room, other in found if other in ROOMS and other != room}


def draw_rooms() -> Figure:
    figure = Figure(figsize=(7.5, 4.4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 0.93), xlim=(0, 7.5), ylim=(0, 4.1))
    axes.set_axis_off()
    place = {name: (0.35 + 0.55 * level, 3.3 - 1.0 * level) for level, name in enumerate(ROOMS)}
    for name, (x, y) in place.items():
        axes.add_patch(matplotlib.patches.FancyBboxPatch((x, y), 4.6, 0.5, boxstyle="round,pad=0.05", fc=GREY, ec=BLUE))
        axes.text(x + 0.1, y + 0.3, name, fontweight="bold", fontsize=10, va="center")
        axes.text(x + 0.1, y + 0.08, ROOMS[name], va="center")
    levels = list(ROOMS)
    for above, below in sorted(arrows()):
        steps = levels.index(below) - levels.index(above)
        (left, bottom), (right, top) = place[above], place[below]
        if steps == 1:
            start, end, bend = (right + 2.3, bottom - 0.06), (right + 2.3, top + 0.56), 0.0
        else:
            start, end, bend = (left + 4.66, bottom + 0.6 - 0.2 * steps), (right + 4.66, top + 0.1 + 0.1 * steps), -0.4
        line = {"arrowstyle": "->", "color": BLUE, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", end, start, arrowprops=line)
    figure.text(0.02, 0.94, "Who imports whom", fontsize=12)
    return figure


def recorded_step(model: rooflama.Model) -> list[tuple[str, str, str]]:
    """(kernel, shapes of its inputs but vectors, shape of its result) of each call of one decode step."""
    calls: list[tuple[str, str, str]] = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = KERNELS[name](*args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            shapes = [list(value.shape) for value in args if len(getattr(value, "shape", ())) > 1]
            calls.append((name, "  ".join(map(str, shapes)), str(list(first.shape))))
            return result

        return call

    with rooflama.swap(**{name: recorded(name) for name in KERNELS}):
        model.generate("The capital of France is", max_new_tokens=2)
    starts = [number for number, call in enumerate(calls) if call[0] == "embedding"]
    return calls[starts[-1] :]


def draw_step(model: rooflama.Model) -> Figure:
    """The calls of one decode step; the layers, which are all alike, once."""
    calls, layers = recorded_step(model), model.config.num_layers
    per_layer = (len(calls) - 3) // layers
    shown = [calls[0], *calls[1 : 1 + per_layer], *calls[-2:]]
    figure = Figure(figsize=(8.6, 0.34 * len(shown) + 0.7), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8.6), ylim=(-len(shown), 1.4))
    axes.set_axis_off()
    axes.text(0.15, 0.95, "One decode step of SmolLM2-135M: each kernel, its inputs and its result", fontsize=12)
    first, last = 1, per_layer
    axes.add_patch(matplotlib.patches.Rectangle((0.12, -last - 0.45), 7.5, per_layer, fc=GREY, ec="none"))
    axes.text(7.7, -(first + last) / 2, f"{layers} layers", va="center")
    for row, (name, shapes, result) in enumerate(shown):
        axes.text(0.25, -row, name, va="center", fontweight="bold", color=BLUE)
        axes.text(2.4, -row, shapes, va="center")
        axes.text(6.6, -row, f"→ {result}", va="center")
    return figure


def draw_bytes(model: rooflama.Model) -> Figure:
    """What one decode step of one sequence reads, against the tokens in its cache."""
    config = model.config
    weights = sum(rooflama.inspect(rooflama.demo_checkpoint()).tensor_bytes.values()) / 1e6
    keys_and_values = config.kv_bytes_per_token(2) * CONTEXTS / 1e6
    figure = Figure(figsize=(7.5, 3.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(CONTEXTS))
    axes.bar(places, weights, color=BLUE, label="weights, as the file quantises them")
    axes.bar(places, keys_and_values, bottom=weights, color=ORANGE, label="keys and values in 16 bits")
    axes.set_xticks(places, [f"{context:,}" for context in CONTEXTS])
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("MB read per step")
    axes.set_title("Bytes of one decode step of SmolLM2-135M")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(folder: Path) -> None:
    """Write the three pictures."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        with rooflama.load(rooflama.demo_checkpoint(), device="cpu", max_context=64, progress=False) as model:
            pictures = {"packages": draw_rooms(), "decode_step": draw_step(model), "bytes": draw_bytes(model)}
        for name, figure in pictures.items():
            figure.savefig(folder / f"how_it_works_{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT / "docs")
