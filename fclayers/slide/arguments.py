"""What the public functions take: windows, axes, images; checked before anything is computed."""

from collections.abc import Sequence
from typing import Any

from fclayers._checks import check_array, check_axes, check_count
from fclayers.slide.values import Grid


def check_windows(
    name: str, window_shape: Any, stride: Any, edges: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    window = window_shape if isinstance(window_shape, (tuple, list)) else (window_shape,)
    if not 1 <= len(window) <= 3:
        raise ValueError(f"{name}: window_shape must have one to three entries, got {window_shape}")
    strides = stride if isinstance(stride, (tuple, list)) else (stride,) * len(window)
    if len(strides) != len(window):
        raise ValueError(
            f"{name}: stride must be an integer or {len(window)}, one per window axis, got {stride}"
        )
    for what, entries in (("window_shape", window), ("stride", strides)):
        if any(check_count(name, what, entry) < 1 for entry in entries):
            raise ValueError(f"{name}: {what} must be at least 1, got {entries}")
    if edges not in ("window", "image"):
        raise ValueError(f"{name}: edges must be 'window' or 'image', got {edges!r}")
    return tuple(map(int, window)), tuple(map(int, strides))


def check_image(name: str, args: Sequence[Any]) -> Any:
    """The image, which is the last argument."""
    if not args:
        raise TypeError(f"{name}: expected the image as the last positional argument, got none")
    check_array(name, "the image, the last argument,", args[-1])
    return args[-1]


def place_windows(
    name: str,
    shape: tuple[int, ...],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    axes: int | tuple[int, ...] | None,
    edges: str,
) -> tuple[Grid, list[int]]:
    """Where the windows lie on an image of this shape, and its window axes."""
    if axes is None and len(shape) < len(window):
        raise ValueError(
            f"{name}: a window {window} needs an image with {len(window)} axes or more, "
            f"got shape {shape}"
        )
    places = check_axes(name, tuple(range(len(window))) if axes is None else axes, shape)
    if len(places) != len(window):
        raise ValueError(f"{name}: axes must name {len(window)} window axes, got {axes}")
    sizes = tuple(shape[place] for place in places)
    if any(size < w for size, w in zip(sizes, window, strict=True)):
        raise ValueError(
            f"{name}: a window of {window} does not fit into an image of shape {shape} "
            f"along its axes {tuple(places)}"
        )
    counts = tuple((n - w) // s + 1 for n, w, s in zip(sizes, window, strides, strict=True))
    return Grid(window, strides, counts, edges == "image"), places
