"""`slide`: a function of one window becomes a function of all windows of a larger image."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fclayers._util.errors import BadValue, public
from fclayers._util.jaxprs import traced_consts
from fclayers._util.trees import abstract
from fclayers.sliding.arguments import check_image, check_windows, place_windows
from fclayers.sliding.cutting import cut_windows
from fclayers.sliding.deferred import run_deferred
from fclayers.sliding.equations import contains
from fclayers.sliding.interpret import Deferred, Trace, interpret
from fclayers.sliding.strips import run_in_strips
from fclayers.sliding.values import Atom, Value, make_value


@public
def slide(
    fun: Callable[..., PyTree[Array]],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    edges: str = "window",
) -> Callable[..., PyTree[Array]]:
    """Makes a function that evaluates `fun` at every window of a larger image.

    It is `vmap` over overlapping windows: what neighboring windows have in common is computed
    once. A network for a fixed window becomes one for images of any size, padding, pools, strides
    and upsampling included, with exactly the results of the windows cut out.

    Args:
        fun: A function `fun(*args, window)` of any JAX operations that returns arrays.
        window_shape: Size of the window along each window axis, one to three of them.
        stride: Pixels between neighboring windows, an integer or one per window axis.
        axes: The window axes of the image, in the order of `window_shape`. Default: the leading
            ones.
        edges: What padding inside `fun` means. `"window"`: it pads each window; only what lies near
            the windows' borders is computed for each of them. `"image"`: it pads the image, and
            windows see their neighbors, as in a fully convolutional network.

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
        ...     return fc.apply_linear(head, fc.max_pool(x, (2, 2)).reshape(-1))
        >>> classify(conv, head, jnp.ones((8, 8, 1))).shape
        (10,)
        >>> fc.slide(classify, (8, 8))(conv, head, jnp.ones((100, 120, 1))).shape
        (93, 113, 10)

    Source: `Giusti et al. 2013 <https://arxiv.org/abs/1302.1700>`_ and
    `Bailer et al. 2018 <https://arxiv.org/abs/1805.03096>`_ for networks of convolutions and pools.
    """
    traced = slide_and_trace(
        fun, window_shape, stride=stride, axes=axes, edges=edges, trace_one=False
    )
    return public(lambda *args: traced(*args)[0], "slide")


def slide_and_trace(
    fun: Callable[..., PyTree[Array]],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...],
    axes: int | tuple[int, ...] | None,
    edges: str,
    trace_one: bool,
) -> Callable[..., tuple[PyTree[Array], Trace]]:
    """`slide`, which also returns what it did.

    It does nothing to the function where there is one window only, unless `trace_one` is set.
    """
    window, strides = check_windows(window_shape, stride, edges)

    def sliding(*args: PyTree) -> tuple[PyTree[Array], Trace]:
        image = check_image(args)
        grid, places = place_windows(image.shape, window, strides, axes, edges)
        trace = Trace(grid)
        atoms = [Atom(size) for size in image.shape]
        shape = list(image.shape)
        for axis, (place, size) in enumerate(zip(places, window, strict=True)):
            atoms[place], shape[place] = Atom(size, axis, 1), size
        one = abstract(shape, jnp.asarray(image).dtype)

        def run(*args: PyTree) -> PyTree[Array]:
            *rest, image = args
            jaxpr, shapes = jax.make_jaxpr(lambda x: fun(*rest, x), return_shape=True)(one)
            if jaxpr.effects:
                raise BadValue(f"the function has side effects, {set(jaxpr.effects)}")
            image = jnp.asarray(image)
            alone = prod(grid.counts) == 1 and (edges == "window" or one.shape == image.shape)
            if alone and not trace_one:
                cut = tuple(slice(size) for size in one.shape)
                results = _run_one(trace, jaxpr, image[cut])
            else:
                results = _run_all(trace, jaxpr, make_value(image, atoms))
            return jax.tree.unflatten(jax.tree.structure(shapes), results)

        explicit = jax.typeof(image).sharding.mesh.explicit_axes
        if explicit:
            # The numbers of positions and of pixels are seldom both divisible by that of devices.
            run = jax.sharding.auto_axes(run, axes=explicit, out_sharding=PartitionSpec())  # type: ignore[no-untyped-call]
        return run(*args), trace

    return sliding


def _run_one(trace: Trace, jaxpr: ClosedJaxpr, window: Array) -> list[Array]:
    """The function as it is.

    Sharing gains nothing here, and XLA's CPU backend miscompiles some updates, in place, of arrays
    that shared values are read from.
    """
    results = jaxpr_as_fun(jaxpr)(window)
    return [jnp.expand_dims(out, range(len(trace.grid.counts))) for out in results]


def _run_all(trace: Trace, jaxpr: ClosedJaxpr, image: Value) -> list[Array]:
    """The results by position."""
    run = partial(_interpret_in_strips, jaxpr=jaxpr, image=image)
    if not contains(jaxpr.jaxpr, "custom_vjp_call"):
        return run(trace, jaxpr.consts, image.array)
    consts, merge = traced_consts(jaxpr.consts)

    def run_with(trace: Trace, consts: Sequence[Array], array: Array) -> list[Array]:
        return run(trace, merge(consts), array)

    # A backward pass need not be linear, and would get the sum over windows if it were shared.
    evaluate = jax.custom_vjp(partial(run_with, trace))
    own = partial(run_with, Trace(trace.grid, keeps_backward_passes=True))
    evaluate.defvjp(partial(jax.vjp, own), lambda backward, cotangents: backward(cotangents))
    results: list[Array] = evaluate(consts, image.array)
    return results


def _interpret_in_strips(
    trace: Trace, consts: Sequence[ArrayLike], array: Array, *, jaxpr: ClosedJaxpr, image: Value
) -> list[Array]:
    known = ClosedJaxpr(jaxpr.jaxpr, consts)

    def run(trace: Trace, array: Array) -> list[Array]:
        return _interpret(trace, known, image._replace(array=array))

    return run_in_strips(trace, jaxpr.jaxpr, run, image._replace(array=array))


def _interpret(trace: Trace, jaxpr: ClosedJaxpr, image: Value) -> list[Array]:
    """What was deferred is run at the end."""
    outs = interpret(trace, jaxpr, [image])
    deferred = run_deferred(trace, outs)
    return [
        deferred[id(out)] if isinstance(out, Deferred) else cut_windows(trace.grid, out)
        for out in outs
    ]
