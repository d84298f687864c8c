"""Checks what the public functions take: windows, axes, images."""

from collections.abc import Sequence

from jaxtyping import PyTree

from fclayers._util.checks import check_array, check_axes, check_count, check_sizes
from fclayers._util.errors import BadType, BadValue
from fclayers.sliding.values import Grid

Sizes = tuple[int, ...]


def check_windows(window_shape: Sizes, stride: int | Sizes, edges: str) -> tuple[Sizes, Sizes]:
    """The window and the strides, one entry per window axis."""
    window = check_sizes("window_shape", window_shape)
    strides = stride if isinstance(stride, (tuple, list)) else (stride,) * len(window)
    if len(strides) != len(window) or any(check_count("stride", entry) < 1 for entry in strides):
        raise BadValue(
            f"stride must be an integer >= 1 or {len(window)}, one per window axis, got {stride}"
        )
    if edges not in ("window", "image"):
        raise BadValue(f"edges must be 'window' or 'image', got {edges!r}")
    return window, tuple(map(int, strides))


def check_image(args: Sequence[PyTree]) -> PyTree:
    """The image, which is the last argument."""
    if not args:
        raise BadType("expected the image as the last positional argument, got none")
    check_array("the image, the last argument,", args[-1])
    return args[-1]


def place_windows(
    shape: Sizes, window: Sizes, strides: Sizes, axes: int | Sizes | None, edges: str
) -> tuple[Grid, list[int]]:
    """Where the windows lie on an image of this shape, and its window axes."""
    if axes is None and len(shape) < len(window):
        raise BadValue(
            f"a window {window} needs an image with {len(window)} axes or more, got shape {shape}"
        )
    places = check_axes(tuple(range(len(window))) if axes is None else axes, shape)
    if len(places) != len(window):
        raise BadValue(f"axes must name {len(window)} window axes, got {axes}")
    sizes = tuple(shape[place] for place in places)
    if any(size < w for size, w in zip(sizes, window, strict=True)):
        raise BadValue(
            f"a window of {window} does not fit into an image of shape {shape} "
            f"along its axes {tuple(places)}"
        )
    counts = tuple((n - w) // s + 1 for n, w, s in zip(sizes, window, strides, strict=True))
    return Grid(window, strides, counts, edges == "image"), places
