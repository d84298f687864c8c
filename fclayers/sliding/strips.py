"""Runs many windows some positions at a time, where values in pieces would need much memory."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, jaxpr_as_fun
from jaxtyping import Array

from fclayers._util.jaxprs import aval
from fclayers.sliding.interpret import Trace
from fclayers.sliding.values import Grid, Value

# A program keeps some values at once; this many times the largest is about what it needs.
_LIVE_VALUES = 8
_MAX_BYTES = 2**29


def run_in_strips(
    trace: Trace, jaxpr: Jaxpr, run: Callable[[Trace, Array], list[Array]], image: Value
) -> list[Array]:
    """The results of `run` for all positions; some at a time, if all need too much memory.

    `run` takes a trace and the array of the image, or the part of it that some positions see. The
    steps noted in the trace are those of all positions at once.
    """
    grid = trace.grid
    if grid.pads_image or _LIVE_VALUES * _bytes_of_windows(grid, jaxpr) < 2 * _MAX_BYTES:
        return run(trace, image.array)
    planned = jax.make_jaxpr(partial(run, trace))(image.array)
    counts = _strip_counts(grid, max((step.bytes_in_pieces for step in trace.steps), default=0))
    if counts == grid.counts:
        results: list[Array] = jaxpr_as_fun(planned)(image.array)
        return results
    strip = trace.inside(grid._replace(counts=counts))
    return _map_strips(grid, counts, partial(run, strip), image)


def _strip_counts(grid: Grid, largest: int) -> tuple[int, ...]:
    """Halves the longest axis until the largest value in pieces, in bytes, fits several times."""
    counts = list(grid.counts)
    needed = _LIVE_VALUES * largest
    while needed * prod(counts) > _MAX_BYTES * prod(grid.counts) and max(counts) > 1:
        longest = counts.index(max(counts))
        counts[longest] = ceil(counts[longest] / 2)
    return tuple(counts)


def _map_strips(
    grid: Grid, counts: Sequence[int], run: Callable[[Array], list[Array]], image: Value
) -> list[Array]:
    """The results of all positions, from a function of the part of the image that some see."""
    starts = [
        [min(i, n - size) for i in range(0, n, size)]
        for n, size in zip(grid.counts, counts, strict=True)
    ]
    places = [
        next(i for i, atom in enumerate(image.atoms) if atom.axis == axis)
        for axis in range(len(counts))
    ]
    sizes = list(image.array.shape)
    for place, size, stride, window in zip(places, counts, grid.stride, grid.window, strict=True):
        sizes[place] = (size - 1) * stride + window

    def run_strip(corner: Array) -> list[Array]:
        begins = [jnp.zeros((), corner.dtype)] * len(sizes)
        for axis, place in enumerate(places):
            begins[place] = corner[axis] * grid.stride[axis]
        return run(lax.dynamic_slice(image.array, begins, sizes))

    corners = jnp.asarray(np.array(list(product(*starts)), np.int32))
    results = lax.map(run_strip, corners)
    return [_assemble(grid, [len(own) for own in starts], counts, array) for array in results]


def _assemble(grid: Grid, numbers: Sequence[int], counts: Sequence[int], array: Array) -> Array:
    """Strips by position; the last along an axis overlaps the one before."""
    # The axes of strips are in front of those of positions; each goes before its own.
    ndim = len(counts)
    array = array.reshape(*numbers, *array.shape[1:])
    for axis in reversed(range(ndim)):
        place = 2 * axis
        array = jnp.moveaxis(array, axis, place)
        size, total = counts[axis], grid.counts[axis]
        whole = (numbers[axis] - 1) * size
        first = lax.slice_in_dim(array, 0, numbers[axis] - 1, axis=place)
        last = lax.index_in_dim(array, numbers[axis] - 1, place, keepdims=False)
        last = lax.slice_in_dim(last, size - (total - whole), size, axis=place)
        shape = (*first.shape[:place], whole, *first.shape[place + 2 :])
        array = jnp.concatenate([first.reshape(shape), last], place)
    return array


def _bytes_of_windows(grid: Grid, jaxpr: Jaxpr) -> int:
    """The largest result in the function, for every window."""
    results = [aval(var) for eqn in jaxpr.eqns for var in eqn.outvars]
    sizes = [prod(result.shape) * result.dtype.itemsize for result in results]
    return prod(grid.counts) * max(sizes, default=0)
