"""Draws the figures of "How slide works" into `docs/images`.

Run it with `python docs/draw_slide.py`; it needs the `examples` extra.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).parent / "images"
INTERIOR, EDGE, CORNER = "#d6e5f3", "#f9d5b5", "#ec8f5c"
BOTH = "#9cc0e2"
INK, QUIET, GRID = "#222222", "#666666", "#b9c8d6"
BLUE, BROWN = "#1f4e79", "#a8400c"


def draw_pieces() -> Figure:
    """Draws two windows on an image, and the nine arrays that hold the values of all of them."""
    figure = Figure(figsize=(8.2, 3.7))
    _draw_windows(figure.add_axes((0.005, 0, 0.375, 1)))
    _draw_nine_pieces(figure.add_axes((0.405, 0, 0.59, 1)))
    return figure


def draw_phases() -> Figure:
    """Draws a row after a pool, split into the windows at even and those at odd positions."""
    figure = Figure(figsize=(8.2, 3.8))
    axes = _prepare(figure.add_axes((0, 0, 1, 1)), (0, 25.2), (12.3, 0.3))
    left, names = 5.6, 18.1
    axes.text(0.3, 0.9, "After a pool of stride 2, every element is kept", fontweight="bold")
    _draw_row(axes, (left, 1.4), range(12))
    for window, color in enumerate((BLUE, BROWN)):
        places, y = [left + window + 2 * j + 0.5 for j in range(3)], 2.75 + 0.5 * window
        axes.plot(places, [y] * 3, "o-", color=color, linewidth=1.5, markersize=4.5)
        axes.text(names, y, f"window {window} sees these", color=color, va="center")
    title = "Upsampled by 2, in phases: the windows of a phase agree about what lies between"
    axes.text(0.3, 4.75, title, fontweight="bold")
    for phase, (name, color) in enumerate((("even", BLUE), ("odd", BROWN))):
        y = 5.25 + 3.65 * phase
        elements = range(phase, 12, 2)
        axes.text(0.3, y + 0.5, f"{name} positions", va="center")
        _draw_row(axes, (left, y), elements)
        axes.text(0.3, y + 1.8, "upsampled", va="center")
        _draw_row(axes, (left, y + 1.3), [i for i in elements for _ in range(2)])
        for k in range(2):
            start, level = left + 2 * k, y + 2.55 + 0.5 * k
            axes.plot([start + 0.06, start + 5.94], [level, level], color=color, linewidth=1.5)
            axes.text(names, level, f"window {phase + 2 * k}", color=color, va="center")
    return figure


def _draw_windows(axes: Axes) -> None:
    width, height, size, border = 15, 15, 10, 2
    _prepare(axes, (-0.3, 15.3), (17.4, -1.5))
    axes.text(0, -0.5, "Two windows of an image", fontweight="bold")
    first, second = (1, 1), (4, 3)  # column and row
    for i, (y, tall) in enumerate(_thirds(size, border)):
        for j, (x, wide) in enumerate(_thirds(size, border)):
            place = (first[0] + x, first[1] + y)
            axes.add_patch(Rectangle(place, wide, tall, facecolor=_color(i, j)))
    left, top = (second[i] + border for i in range(2))
    right, bottom = (first[i] + size - border for i in range(2))
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=BOTH))
    for k in range(width + 1):
        axes.plot([k, k], [0, height], color=GRID, linewidth=0.5)
        axes.plot([0, width], [k, k], color=GRID, linewidth=0.5)
    for (x, y), color in ((first, BLUE), (second, BROWN)):
        inner = size - 2 * border
        outline = {"fill": False, "edgecolor": color, "zorder": 4}
        axes.add_patch(Rectangle((x, y), size, size, linewidth=2, **outline))
        place = (x + border, y + border)
        axes.add_patch(Rectangle(place, inner, inner, linewidth=1.2, linestyle="--", **outline))
    text = "Padding changes a window near its border.\nWhere both are interior (dark), they agree."
    axes.text(0, height + 0.3, text, va="top", linespacing=1.3)


def _draw_nine_pieces(axes: Axes) -> None:
    _prepare(axes, (0, 26), (20.9, -1.8))
    axes.text(0, -0.6, "The arrays for all windows", fontweight="bold")
    labels = {
        (1, 1): "interior\n156 × 156",
        (0, 1): "edge\n129 × 2 × 156",
        (1, 0): "edge\n129 ×\n156 × 2",
        (0, 0): "corner\n129 × 129\n× 2 × 2",
    }
    columns, rows = [(0, 5.6), (6.2, 13.6), (20.4, 5.6)], [(0, 4), (4.6, 8.8), (14, 4)]
    for i, (y, tall) in enumerate(rows):
        for j, (x, wide) in enumerate(columns):
            style = {"facecolor": _color(i, j), "edgecolor": QUIET, "linewidth": 0.8}
            axes.add_patch(Rectangle((x, y), wide, tall, **style))
            place, text = (x + wide / 2, y + tall / 2), labels[i % 2, j % 2]
            axes.text(*place, text, ha="center", va="center", linespacing=1.3)
    words = ["once per pixel", "once per pixel and row of the border", "once per window"]
    for x, color, text in zip((0, 6.2, 19.3), (INTERIOR, EDGE, CORNER), words, strict=True):
        style = {"facecolor": color, "edgecolor": QUIET, "linewidth": 0.6}
        axes.add_patch(Rectangle((x, 18.9), 0.8, 0.9, **style))
        axes.text(x + 1.1, 19.35, text, va="center", fontsize=8.5)


def _draw_row(axes: Axes, place: tuple[float, float], elements: Sequence[int]) -> None:
    """Boxes with numbers, in the color of their phase."""
    for x, element in enumerate(elements):
        corner = (place[0] + x, place[1])
        style = {"facecolor": (INTERIOR, EDGE)[element % 2], "edgecolor": QUIET, "linewidth": 0.6}
        axes.add_patch(Rectangle(corner, 1, 1, **style))
        axes.text(corner[0] + 0.5, corner[1] + 0.55, str(element), ha="center", va="center")


def _thirds(size: int, border: int) -> list[tuple[int, int]]:
    """Starts and sizes of the border, the interior and the other border."""
    return [(0, border), (border, size - 2 * border), (size - border, border)]


def _color(row: int, column: int) -> str:
    return (CORNER, EDGE, INTERIOR)[(row == 1) + (column == 1)]


def _prepare(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> Axes:
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()
    return axes


def main() -> None:
    """Draws both."""
    mpl.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "fclayers"})
    for name, draw in (("slide_pieces", draw_pieces), ("slide_phases", draw_phases)):
        draw().savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
