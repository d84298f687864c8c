"""`slide`: a function of one window becomes a function of all windows of a larger image."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fclayers.slide.arguments import check_image, check_windows, place_windows
from fclayers.slide.elementwise import bind
from fclayers.slide.interpret import Late, Trace, interpret
from fclayers.slide.values import Atom, Value, cut_window, cut_windows, make_value

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
        of them along each axis. It can be jitted, differentiated, vmapped and sharded; results for
        an image on an explicit mesh are replicated. A random key inside is shared by all windows.

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
    traced = slide_and_trace("slide", fun, window_shape, stride=stride, axes=axes, edges=edges)
    return lambda *args: traced(*args)[0]


def slide_and_trace(
    name: str,
    fun: Callable[..., Any],
    window_shape: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...],
    axes: int | tuple[int, ...] | None,
    edges: str,
) -> Callable[..., tuple[Any, Trace, Any]]:
    """`slide`, which also returns what it did and the shape and dtype of a window."""
    window, strides = check_windows(name, window_shape, stride, edges)

    def sliding(*args: Any) -> tuple[Any, Trace, Any]:
        image = check_image(name, args)
        grid, places = place_windows(name, image.shape, window, strides, axes, edges)
        trace = Trace(grid)
        atoms = [Atom(size) for size in image.shape]
        shape = list(image.shape)
        for axis, (place, size) in enumerate(zip(places, window, strict=True)):
            atoms[place], shape[place] = Atom(size, axis, 1), size
        one = jax.ShapeDtypeStruct(shape, jnp.asarray(image).dtype)  # type: ignore[no-untyped-call]

        def run(*args: Any) -> Any:
            *rest, image = args
            jaxpr, shapes = jax.make_jaxpr(lambda x: fun(*rest, x), return_shape=True)(one)
            if jaxpr.effects:
                raise ValueError(f"{name}: the function has side effects, {set(jaxpr.effects)}")
            outs = interpret(trace, jaxpr, [make_value(jnp.asarray(image), atoms)])
            return jax.tree.unflatten(jax.tree.structure(shapes), _finish(trace, outs))

        explicit = jax.typeof(image).sharding.mesh.explicit_axes
        if explicit:
            # The numbers of positions and of pixels are seldom both divisible by that of devices.
            run = jax.sharding.auto_axes(run, axes=explicit, out_sharding=PartitionSpec())  # type: ignore[no-untyped-call]
        return run(*args), trace, one

    return sliding


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

    def run_window(index: Array) -> dict[int, Array]:
        position = jnp.unravel_index(index, trace.grid.counts)
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
    bytes_per_window = sum(
        prod(var.aval.shape) * var.aval.dtype.itemsize for eqn, _, _ in steps for var in eqn.outvars
    )
    chunk = max(1, min(prod(counts), _CHUNK_BYTES // max(bytes_per_window, 1)))
    results = lax.map(run_window, jnp.arange(prod(counts)), batch_size=chunk)
    return {key: array.reshape(*counts, *array.shape[1:]) for key, array in results.items()}
