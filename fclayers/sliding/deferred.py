"""Runs the steps that cannot be shared, window by window, in chunks of bounded memory."""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fclayers._util.jaxprs import aval, bind
from fclayers.sliding.costs import CHUNK_BYTES
from fclayers.sliding.cutting import cut_window
from fclayers.sliding.interpret import Deferred, Result, Trace


def run_deferred(trace: Trace, outs: Sequence[Result]) -> dict[int, Array]:
    """The deferred ones of a function's results, by their `id`, positions in front."""
    wanted = list(dict.fromkeys(id(out) for out in outs if isinstance(out, Deferred)))
    if not wanted:
        return {}
    needed, steps = set(wanted), []
    for step in reversed(trace.deferred):
        if any(id(result) in needed for result in step.results):
            steps.append(step)
            needed |= {id(value) for value in step.inputs if isinstance(value, Deferred)}
    steps.reverse()

    def run_window(index: Array) -> list[Array]:
        position = jnp.unravel_index(index, trace.grid.counts)
        known: dict[int, Array] = {}

        def read(value: Result) -> Array:
            if id(value) not in known:
                assert not isinstance(value, Deferred)
                known[id(value)] = cut_window(trace.grid, value, position)
            return known[id(value)]

        for eqn, inputs, results in steps:
            known.update(zip(map(id, results), bind(eqn, *map(read, inputs)), strict=True))
        return [known[key] for key in wanted]

    counts = trace.grid.counts
    computed = [aval(var) for step in steps for var in step.eqn.outvars]
    bytes_per_window = sum(prod(array.shape) * array.dtype.itemsize for array in computed)
    results = _map_in_chunks(run_window, prod(counts), CHUNK_BYTES // max(bytes_per_window, 1))
    shaped = (array.reshape(*counts, *array.shape[1:]) for array in results)
    return dict(zip(wanted, shaped, strict=True))


def _map_in_chunks(
    run_window: Callable[[Array], list[Array]], count: int, chunk: int
) -> list[Array]:
    """The results of all windows, without loops of one step, some of which XLA miscompiles."""
    indices = jnp.arange(count)
    try:
        if chunk >= count:
            results: list[Array] = jax.vmap(run_window)(indices)
        else:
            results = lax.map(run_window, indices, batch_size=max(1, min(chunk, count // 2)))
    except NotImplementedError:  # a step that cannot be mapped
        results = lax.map(run_window, indices)
    return results
