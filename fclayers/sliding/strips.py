"""Runs many windows some positions at a time, where all at once need much memory, or any cache.

On CPUs, maps that do not fit into the caches are written to memory and read again, layer by layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jaxtyping import Array

from fclayers._util.jaxprs import aval, traced_consts
from fclayers._util.trees import abstract
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.sliding.interpret import Trace
from fclayers.sliding.values import Grid, Value

# A program keeps some values at once; this many times the largest is about what it needs.
_LIVE_VALUES = 8
_MAX_BYTES = 2**29
# Neighbouring strips compute twice what both see. More of it than this is not worth the cache, and
# where strips see this many times as many pixels, it is always more.
_MOST_WORK = 1.1
_MOST_PIXELS = 2


def run_in_strips(
    trace: Trace, jaxpr: Jaxpr, run: Callable[[Trace, Array], list[Array]], image: Value
) -> list[Array]:
    """The results of `run` for all positions; some at a time, if that is better.

    `run` takes a trace and the array of the image, or the part of it that some positions see. The
    steps noted in the trace are those of all positions at once.
    """
    grid = trace.grid
    if grid.pads_image or _bytes_of_windows(grid, jaxpr) < 2 * CROSSOVERS.strip_bytes:
        return run(trace, image.array)
    whole = jax.make_jaxpr(partial(run, trace))(image.array)
    counts = _counts_in_memory(grid, max((step.bytes_in_pieces for step in trace.steps), default=0))
    if counts != grid.counts:
        few = partial(run, trace.inside(grid._replace(counts=counts)))
        return _map_strips(grid, counts, few, whole.out_avals, image, image.array)
    counts = _counts_in_cache(grid, max((step.bytes for step in trace.steps), default=0))
    strips = ceil(grid.counts[0] / counts[0])
    part = abstract(_strip_shape(grid, counts, image), image.array.dtype)
    if strips > 1 and strips * prod(part.shape) <= _MOST_PIXELS * image.array.size:
        inside = trace.inside(grid._replace(counts=counts))
        strip = jax.make_jaxpr(partial(run, inside))(part)
        if strips * _operations(inside) <= _MOST_WORK * _operations(trace):
            return _run_for_platform(grid, counts, whole, strip, image)
    results: list[Array] = jaxpr_as_fun(whole)(image.array)
    return results


def _run_for_platform(
    grid: Grid, counts: tuple[int, ...], whole: ClosedJaxpr, strip: ClosedJaxpr, image: Value
) -> list[Array]:
    """In strips on CPUs, if the function is only evaluated: its derivatives need all values."""
    of_whole, merge_whole = traced_consts(whole.consts)
    of_strip, merge_strip = traced_consts(strip.consts)
    split = len(of_whole)

    def on_cpu(*args: Array) -> list[Array]:
        *consts, array = args
        run = jaxpr_as_fun(ClosedJaxpr(strip.jaxpr, merge_strip(consts[split:])))
        return _map_strips(grid, counts, run, whole.out_avals, image, array)

    def elsewhere(*args: Array) -> list[Array]:
        *consts, array = args
        results: list[Array] = jaxpr_as_fun(ClosedJaxpr(whole.jaxpr, merge_whole(consts[:split])))(
            array
        )
        return results

    @jax.custom_jvp
    def evaluate(*args: Array) -> list[Array]:
        results: list[Array] = lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)
        return results

    def derivative(
        primals: Sequence[Array], tangents: Sequence[Array | SymbolicZero]
    ) -> tuple[list[Array], list[Array]]:
        varied = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def vary(*values: Array) -> list[Array]:
            known = dict(zip(varied, values, strict=True))
            return elsewhere(*(known.get(i, primal) for i, primal in enumerate(primals)))

        directions = [tangents[i] for i in varied]
        result: tuple[list[Array], list[Array]] = jax.jvp(
            vary, [primals[i] for i in varied], directions
        )
        return result

    evaluate.defjvp(derivative, symbolic_zeros=True)
    return evaluate(*of_whole, *of_strip, image.array)


def _counts_in_memory(grid: Grid, largest: int) -> tuple[int, ...]:
    """Halves the longest axis until the largest value in pieces, in bytes, fits several times."""
    counts = list(grid.counts)
    needed = _LIVE_VALUES * largest
    while needed * prod(counts) > _MAX_BYTES * prod(grid.counts) and max(counts) > 1:
        longest = counts.index(max(counts))
        counts[longest] = ceil(counts[longest] / 2)
    return tuple(counts)


def _counts_in_cache(grid: Grid, largest: int) -> tuple[int, ...]:
    """Cuts the first axis until the largest value, in bytes, fits."""
    first, *rest = grid.counts
    strips = min(first, ceil(largest / CROSSOVERS.strip_bytes))
    return ceil(first / max(1, strips)), *rest


def _map_strips(
    grid: Grid,
    counts: tuple[int, ...],
    run: Callable[[Array], list[Array]],
    results: Sequence[jax.core.ShapedArray],
    image: Value,
    array: Array,
) -> list[Array]:
    """The results of all positions, from a function of the part of the image that some see."""
    # The last strip is moved back to be as large as the others; it overwrites with equal values.
    starts = [
        np.minimum(np.arange(0, n, size), n - size)
        for n, size in zip(grid.counts, counts, strict=True)
    ]
    corners = np.array(list(product(*starts)), np.int32)
    shape, places = _strip_shape(grid, counts, image), _places(image, len(counts))

    def add_strip(i: Array, wholes: list[Array]) -> list[Array]:
        corner = jnp.asarray(corners)[i]
        zero = jnp.zeros((), corner.dtype)
        begins = [zero] * len(shape)
        for axis, place in enumerate(places):
            begins[place] = corner[axis] * grid.stride[axis]
        parts = run(lax.dynamic_slice(array, begins, shape))
        return [
            lax.dynamic_update_slice(whole, part, [*corner, *[zero] * (part.ndim - len(counts))])
            for whole, part in zip(wholes, parts, strict=True)
        ]

    empty = [jnp.zeros_like(result) for result in results]
    mapped: list[Array] = lax.fori_loop(0, len(corners), add_strip, empty)
    return mapped


def _strip_shape(grid: Grid, counts: Sequence[int], image: Value) -> list[int]:
    """The shape of the part of the image that these positions see."""
    shape = list(image.array.shape)
    along = zip(_places(image, len(counts)), counts, grid.stride, grid.window, strict=True)
    for place, size, stride, window in along:
        shape[place] = (size - 1) * stride + window
    return shape


def _places(image: Value, ndim: int) -> list[int]:
    """The image's dimension of every window axis."""
    axes = [atom.axis for atom in image.atoms]
    return [axes.index(axis) for axis in range(ndim)]


def _operations(trace: Trace) -> float:
    return sum(step.operations for step in trace.steps)


def _bytes_of_windows(grid: Grid, jaxpr: Jaxpr) -> int:
    """The largest result in the function, for every window."""
    results = [aval(var) for eqn in jaxpr.eqns for var in eqn.outvars]
    sizes = [prod(result.shape) * result.dtype.itemsize for result in results]
    return prod(grid.counts) * max(sizes, default=0)
