"""What the notebooks draw with: one style, and pictures that carry a description."""

from __future__ import annotations

import io

import matplotlib
from IPython.display import Image, display
from matplotlib.figure import Figure

from rooflama.kernels.facts import PALETTE

matplotlib.rcParams.update(
    {
        "figure.facecolor": "white",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
        "image.interpolation": "nearest",
    }
)


def show(figure: Figure, alt: str) -> None:
    """Display a figure once, as PNG, with ``alt`` for readers who do not see it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=88, bbox_inches="tight")
    display(Image(data.getvalue(), format="png", alt=alt))


def heatmap(figure: Figure, axes, values, *, label: str, **options):
    """An image with its colour bar, whose label names the quantity and its unit."""
    image = axes.imshow(values, **{"cmap": "viridis", "aspect": "auto"} | options)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label)
    return image
