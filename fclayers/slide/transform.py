"""`slide`: a function of one window becomes a function of all windows of a larger image."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers._checks import check_axes, check_count, describe
from fclayers.slide.elementwise import bind
from fclayers.slide.interpret import Late, Trace, interpret
from fclayers.slide.values import Atom, Grid, Value, cut_window, cut_windows, make_value

# Windows that cannot be shared are run in chunks of about this size.
_CHUNK_BYTES = 2**26


def slide(
    fun: Callable[..., Any],
    window_shape: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    edges: str = "window",
) -> Callable[..., Any]:
    """Makes a function that evaluates `fun` at every window of a larger image.

    It is `vmap` over windows that overlap: what neighbouring windows have in common is computed
    once. A network for a fixed window becomes one that runs over the whole image, pools and strides
    included, and gives exactly the results of the windows cut out.

    Args:
        fun: A function `fun(*args, window)`, of any JAX operations, that returns arrays.
        window_shape: Size of the window along each window axis, one to three of them. An integer
            is a window along one axis.
        stride: Pixels between neighbouring windows, an integer or one per window axis.
        axes: The window axes of the image, in the order of `window_shape`. Default: the leading
            ones.
        edges: What padding inside `fun` means. `"window"`: what `fun` does to a window; such steps
            are run window by window. `"image"`: padding applies at the border of the image, and
            windows see their neighbours, as in a fully convolutional network.

    Returns:
        A function `g(*args, image)` with, for every position and for `"window"` edges,
        `g(*args, image)[i, j] == fun(*args, image[i * s : i * s + h, j * s : j * s + w])` up to
        rounding. Positions are the leading axes of all its results, `(size - window) // stride + 1`
        of them along each axis. It can be jitted, differentiated, vmapped and sharded. A random key
        inside is shared by all windows.

    Raises:
        TypeError: The last argument is not an array.
        ValueError: The window does not fit the image, an argument is out of range, or `fun` has
            side effects.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> conv = fc.init_conv(jax.random.key(0), (3, 3), 1, 8)
        >>> head = fc.init_linear(jax.random.key(1), 3 * 3 * 8, 10)
        >>> def classify(conv, head, window):
        ...     x = jax.nn.relu(fc.apply_conv(conv, window))
        ...     return fc.apply_linear(head, fc.max_pool(x, 2).reshape(-1))
        >>> classify(conv, head, jnp.ones((8, 8, 1))).shape
        (10,)
        >>> fc.slide(classify, (8, 8))(conv, head, jnp.ones((100, 120, 1))).shape
        (93, 113, 10)

    Source: `Giusti et al. 2013 <https://arxiv.org/abs/1302.1700>`_ and
    `Bailer et al. 2018 <https://arxiv.org/abs/1805.03096>`_ for networks of convolutions and pools.
    """
    name = "slide"
    window, strides, edges = check_windows(name, window_shape, stride, edges)

    def sliding(*args: Any) -> Any:
        *rest, image = check_arguments(name, args)
        grid, image_value = lay_out(name, image, window, strides, axes, edges)
        closed, tree = trace_window(name, fun, rest, image_value)
        trace = Trace(grid)
        outs = interpret(trace, closed, [image_value])
        return jax.tree.unflatten(tree, _finish(trace, outs))

    return sliding


def check_windows(
    name: str, window_shape: Any, stride: Any, edges: str
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
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
    return tuple(map(int, window)), tuple(map(int, strides)), edges


def check_arguments(name: str, args: Sequence[Any]) -> Sequence[Any]:
    if not args:
        raise TypeError(f"{name}: expected the image as the last positional argument, got none")
    image = args[-1]
    if not (hasattr(image, "shape") and hasattr(image, "dtype")):
        raise TypeError(
            f"{name}: expected the image, the last argument, to be an array, got {describe(image)}"
        )
    return args


def lay_out(
    name: str,
    image: Any,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    axes: int | tuple[int, ...] | None,
    edges: str,
) -> tuple[Grid, Value]:
    """The grid of windows, and the image as the value of every window."""
    if axes is None:
        axes = tuple(range(len(window)))
        if len(axes) > image.ndim:
            raise ValueError(
                f"{name}: a window {window} needs an image with {len(window)} axes or more, "
                f"got shape {image.shape}"
            )
    places = check_axes(name, axes, image.shape)
    if len(places) != len(window):
        raise ValueError(f"{name}: axes must name {len(window)} window axes, got {axes}")
    sizes = tuple(image.shape[place] for place in places)
    if any(size < w for size, w in zip(sizes, window, strict=True)):
        raise ValueError(
            f"{name}: a window of {window} does not fit into the image of shape {image.shape} "
            f"along its axes {tuple(places)}"
        )
    counts = tuple((n - w) // s + 1 for n, w, s in zip(sizes, window, strides, strict=True))
    atoms = [Atom(size) for size in image.shape]
    for axis, (place, size) in enumerate(zip(places, window, strict=True)):
        atoms[place] = Atom(size, axis, 1)
    return Grid(window, strides, counts, edges == "image"), make_value(jnp.asarray(image), atoms)


def trace_window(
    name: str, fun: Callable[..., Any], rest: Sequence[Any], image: Value
) -> tuple[Any, Any]:
    """The jaxpr of the function of one window, and the tree of its results."""
    window = jax.ShapeDtypeStruct(image.shape, image.array.dtype)  # type: ignore[no-untyped-call]
    closed, shapes = jax.make_jaxpr(lambda window: fun(*rest, window), return_shape=True)(window)
    if closed.effects:
        raise ValueError(f"{name}: the function has side effects, {set(closed.effects)}")
    return closed, jax.tree.structure(shapes)


def _finish(trace: Trace, outs: Sequence[Value | Late]) -> list[Array]:
    """Lays out the results by position; runs what was put off window by window."""
    late = _run_put_off(trace, outs)
    return [
        late[id(out)] if isinstance(out, Late) else cut_windows(trace.grid, out) for out in outs
    ]


def _run_put_off(trace: Trace, outs: Sequence[Value | Late]) -> dict[int, Array]:
    wanted = {id(out) for out in outs if isinstance(out, Late)}
    if not wanted:
        return {}
    needed, steps = set(wanted), []
    for eqn, inputs, results in reversed(trace.put_off):
        if any(id(result) in needed for result in results):
            steps.append((eqn, inputs, results))
            needed |= {id(value) for value in inputs if isinstance(value, Late)}
    steps.reverse()

    def run_window(position: Array) -> dict[int, Array]:
        known: dict[int, Array] = {}

        def read(value: Value | Late) -> Array:
            if id(value) not in known:
                assert isinstance(value, Value)
                known[id(value)] = cut_window(trace.grid, value, position)
            return known[id(value)]

        for eqn, inputs, results in steps:
            arrays = bind(eqn, *map(read, inputs))
            arrays = arrays if eqn.primitive.multiple_results else [arrays]
            known.update(zip(map(id, results), arrays, strict=True))
        return {key: known[key] for key in wanted}

    counts = trace.grid.counts
    positions = np.indices(counts).reshape(len(counts), -1).T
    bytes_per_window = sum(
        prod(var.aval.shape) * var.aval.dtype.itemsize for eqn, _, _ in steps for var in eqn.outvars
    )
    chunk = max(1, min(len(positions), _CHUNK_BYTES // max(bytes_per_window, 1)))
    results = lax.map(run_window, jnp.asarray(positions), batch_size=chunk)
    return {key: array.reshape(*counts, *array.shape[1:]) for key, array in results.items()}
