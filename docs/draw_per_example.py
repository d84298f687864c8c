"""Draws the figure of "One gradient per example" into `docs/images`.

Run it with `python docs/draw_per_example.py`; it needs the `examples` extra.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).parent / "images"
INK, QUIET = "#222222", "#666666"
BLUE, BROWN, GREEN = "#1f4e79", "#a8400c", "#3d6b35"
INPUT = [0.9, 0.15, 0.55, 0.0, 0.75, 0.35]
GRADIENT = [0.3, 0.95, 0.1, 0.6, 0.0, 0.45, 0.8, 0.2]
FEW = 3  # examples of the batch


def draw() -> Figure:
    """Draws one example's gradient, and what two matrices say about those of a batch."""
    figure = Figure(figsize=(8.2, 3.7))
    _draw_one(figure.add_axes((0, 0, 0.42, 1)))
    _draw_batch(figure.add_axes((0.44, 0, 0.56, 1)))
    return figure


def _draw_one(axes: Axes) -> None:
    _prepare(axes, (0, 13), (14.4, 0.3))
    axes.text(0.3, 0.9, "One example", fontweight="bold")
    left, top = 3.6, 4.1
    _draw_cells(axes, (0.6, top), np.array(INPUT)[:, None], BLUE)
    _draw_cells(axes, (left, 1.9), np.array(GRADIENT)[None], BROWN)
    _draw_cells(axes, (left, top), np.outer(INPUT, GRADIENT), GREEN)
    axes.text(left + 4, 3.5, "gradient $g$ of the output", color=BROWN, ha="center", va="center")
    axes.text(2.3, top + 3, "input $a$", color=BLUE, ha="center", va="center", rotation="vertical")
    axes.text(left + 4, top + 6.75, "gradient of the weight: $a\\,g^T$", color=GREEN, ha="center")
    axes.text(left + 4, top + 8.2, "norm: $\\|a\\|\\cdot\\|g\\|$", color=INK, ha="center")
    axes.text(left + 4, top + 9.4, "14 numbers instead of 48", color=QUIET, ha="center")


def _draw_batch(axes: Axes) -> None:
    _prepare(axes, (0, 17.4), (14.4, 0.3))
    axes.text(0.2, 0.9, "All examples of a batch, one per row of $A$ and $G$", fontweight="bold")
    rng = np.random.default_rng(3)
    inputs, gradients = rng.uniform(size=(FEW, 6)), rng.uniform(size=(FEW, 8))
    scales = np.array([[1.0], [0.35], [0.7]])

    axes.text(0.2, 2.3, "norms: those of the rows of $A$ and $G$, multiplied")
    _draw_cells(axes, (0.2, 2.8), inputs, BLUE, 0.6)
    _draw_cells(axes, (4.6, 2.8), gradients, BROWN, 0.6)
    norms = np.linalg.norm(inputs, axis=1) * np.linalg.norm(gradients, axis=1)
    _draw_sign(axes, (10.3, 3.7), "→")
    _draw_cells(axes, (11.2, 2.8), norms[:, None] / norms.max(), GREEN, 0.6)

    axes.text(0.2, 5.7, "clipped sum: one product, the rows of $G$ scaled first")
    _draw_cells(axes, (0.2, 6.2), inputs.T, BLUE, 0.6)
    _draw_sign(axes, (2.65, 8), "×")
    _draw_cells(axes, (3.3, 7.1), scales * gradients, BROWN, 0.6)
    _draw_sign(axes, (9, 8), "=")
    total = inputs.T @ (scales * gradients)
    _draw_cells(axes, (9.9, 6.2), total / total.max(), GREEN, 0.6)

    axes.text(0.2, 11, "inner products of all pairs: $A A^T$ times $G G^T$, entry by entry")
    products = inputs @ inputs.T, gradients @ gradients.T
    places = zip((0.2, 3.3, 6.4), (*products, products[0] * products[1]), strict=True)
    for (x, product), color in zip(places, (BLUE, BROWN, GREEN), strict=True):
        _draw_cells(axes, (x, 11.5), product / product.max(), color, 0.6)
    _draw_sign(axes, (2.65, 12.4), "∘")
    _draw_sign(axes, (5.75, 12.4), "=")


def _draw_cells(
    axes: Axes, place: tuple[float, float], values: np.ndarray, color: str, size: float = 1.0
) -> None:
    """A matrix of values from 0 to 1, of squares between white and the color."""
    for (i, j), value in np.ndenumerate(values):
        shade = [1 - value * (1 - channel) for channel in _light(color)]
        corner = (place[0] + j * size, place[1] + i * size)
        style = {"facecolor": shade, "edgecolor": QUIET, "linewidth": 0.5}
        axes.add_patch(Rectangle(corner, size, size, **style))


def _draw_sign(axes: Axes, place: tuple[float, float], sign: str) -> None:
    axes.text(*place, sign, ha="center", va="center", fontsize=12)


def _light(color: str) -> Sequence[float]:
    """Half as dark, so that the largest value is not black."""
    return [0.25 + 0.75 * channel for channel in to_rgb(color)]


def _prepare(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()


def main() -> None:
    """Draws it."""
    mpl.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "fclayers"})
    draw().savefig(IMAGES / "outer_product.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
