"""What ``rooflama.compare`` found, as a table for terminals and notebooks, as plain values, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from rooflama.kernels import RooflamaError
from rooflama.kernels.facts import fact_html, fact_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {
    "as loaded": "in the passes of the model as loaded",
    "unfused": "in unfused passes (fused=False): the model as loaded runs it inside larger kernels",
    "own tensors": "on the model's tensors: no pass over a prompt calls it",
}
COLUMNS = ("pass", "layer", "error", "tolerance", "kernel's own error", "drift", "")


@dataclass(frozen=True)
class LayerError:
    """The worst call of one layer in one pass. All errors are relative to the largest value of the definition's result.

    Attributes:
        phase: ``prompt`` or ``decoding``; ``own tensors`` for a kernel that no pass calls.
        layer: from 0; None for the embedding, the logits and sampling.
        error: max|function - definition|, of the worst output.
        tolerance: twice ``own_error`` and 4 units in the last place; 0 for token ids.
        own_error: max|kernel - definition|, which is rounding alone.
    """

    phase: str
    layer: int | None
    error: float
    tolerance: float
    own_error: float

    @property
    def is_beyond(self) -> bool:
        return not self.error <= self.tolerance

    @property
    def excess(self) -> float:
        """error / tolerance."""
        return self.error / self.tolerance if self.tolerance else float("inf") if self.error else 0.0

    @property
    def place(self) -> str:
        return f"{self.phase}, {'outside the layers' if self.layer is None else f'layer {self.layer}'}"


@dataclass(frozen=True)
class Speed:
    """Seconds of all calls of one pass together, after a run to warm up.

    Attributes:
        kernel, replacement: medians.
        spread: between the 20th and the 80th percentile, as a share of the median; the larger of the two.
        how: what was timed.
    """

    kernel: float
    replacement: float
    spread: float
    how: str

    @property
    def ratio(self) -> float:
        """How many times as fast the function is; below 1 it is slower."""
        return self.kernel / self.replacement


@dataclass(frozen=True)
class Comparison:
    """A function beside a kernel, call by call. Shows itself in a terminal and in Jupyter.

    Attributes:
        kernel, replacement: the kernel's name and the function's.
        model, device: the model's name, its device and dtype, in words.
        way: ``as loaded``, ``unfused`` or ``own tensors``: which calls were compared.
        num_tokens: of the prompt.
        layers: the errors, in the order in which the model runs its layers.
        drift: (pass, layer) -> the relative change of the residual stream, as a norm, when the function replaces the
            kernel in every layer.
        same_token: whether the likeliest token after the prompt stays the same then.
        speeds: pass -> times.
    """

    kernel: str
    replacement: str
    model: str
    device: str
    way: str
    num_tokens: int
    layers: list[LayerError]
    drift: dict[tuple[str, int], float]
    same_token: bool
    speeds: dict[str, Speed]

    @property
    def first_beyond(self) -> LayerError | None:
        """The first layer whose error exceeds its tolerance."""
        return next((layer for layer in self.layers if layer.is_beyond), None)

    def plot(self) -> Figure:
        """The errors of each layer with their tolerance, and the drift. Needs matplotlib.

        Raises:
            RooflamaError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise RooflamaError(
                "matplotlib is not installed",
                rule="the picture is drawn with it",
                remedy="Run: pip install 'rooflama[bench]', or print the comparison, which is a table",
            ) from error
        phases = list(dict.fromkeys(layer.phase for layer in self.layers))
        figure = Figure(figsize=(5.5 * len(phases), 3.8), layout="constrained")
        figure.suptitle(f"{self.replacement} in place of {self.kernel}\n{self.model}", fontsize="medium")
        for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
            rows = [layer for layer in self.layers if layer.phase == phase]
            x = [-1 if row.layer is None else row.layer for row in rows]
            axes.plot(x, [row.error for row in rows], "o", color="#d1495b", label=f"error of {self.replacement}")
            axes.plot(x, [row.tolerance for row in rows], "_", color="#222222", markersize=10, label="tolerance")
            axes.plot(x, [row.own_error for row in rows], ".", color="#4878a8", label=f"error of {self.kernel}")
            drift = {layer: value for (where, layer), value in self.drift.items() if where == phase}
            axes.plot(drift.keys(), drift.values(), "-", color="#e08a1e", linewidth=1, label="drift of the stream")
            axes.set_yscale("symlog", linthresh=1e-9)
            axes.set(title=phase, xlabel="layer (-1: outside the layers)", ylabel="relative error")
        axes.legend(fontsize="small")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            **{name: getattr(self, name) for name in ("kernel", "replacement", "model", "device", "way", "num_tokens")},
            "layers": [vars(layer) | {"is_beyond": layer.is_beyond} for layer in self.layers],
            "drift": [{"phase": phase, "layer": layer, "drift": d} for (phase, layer), d in self.drift.items()],
            "same_token": self.same_token,
            "speeds": {phase: vars(speed) | {"ratio": speed.ratio} for phase, speed in self.speeds.items()},
        }

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (label, value)."""
        beyond = self.first_beyond
        count = sum(layer.is_beyond for layer in self.layers)
        worst = max(self.layers, key=lambda layer: layer.excess)
        verdict = (
            f"none; the worst is {worst.excess:.2g} of it, in {worst.place}"
            if beyond is None
            else f"{beyond.place}: error {beyond.error:.1e}, {beyond.tolerance:.1e} allowed; {count} in all"
        )
        speeds = (
            f"{phase}: {speed.ratio:.2f} times as fast ({speed.replacement * 1e3:.3g} ms, {self.kernel} "
            f"{speed.kernel * 1e3:.3g} ms; medians, spread {speed.spread:.0%}; {speed.how})"
            for phase, speed in self.speeds.items()
        )
        return [
            ("compared", f"{self.replacement} with {self.kernel}, {WAYS[self.way]}"),
            ("model", f"{self.model}, {self.device}; {self.num_tokens} tokens"),
            ("beyond the tolerance", verdict),
            *(("speed", line) for line in speeds),
            ("next token", "the same" if self.same_token else "another one"),
        ]

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for one in self.layers:
            drift = None if one.layer is None else self.drift.get((one.phase, one.layer))
            yield (
                one.phase,
                "-" if one.layer is None else str(one.layer),
                *(f"{value:.1e}" for value in (one.error, one.tolerance, one.own_error)),
                "-" if drift is None else f"{drift:.1e}",
                "beyond" if one.is_beyond else "",
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield fact_table(self.rows())
        table = Table(*COLUMNS, box=None, padding=(0, 2, 0, 0))
        for cells in self._cells():
            table.add_row(*cells, style="red" if cells[-1] else None)
        yield table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = ""
        for cells in self._cells():
            style = " style='color:#b00020'" if cells[-1] else ""
            body += f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        return f"{fact_html(self.rows())}<table><tr>{head}</tr>{body}</table>"
