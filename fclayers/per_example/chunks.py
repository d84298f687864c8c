"""Functions of one example on all of a batch, in chunks of bounded memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

# What is computed for some examples at a time takes about this much memory.
CHUNK_BYTES = 2**24


def chunk_of(count: int, bytes_per_example: float) -> int:
    """How many examples are computed at a time."""
    return int(min(count, max(1, CHUNK_BYTES // max(1, bytes_per_example))))


def map_examples(
    fun: Callable[[PyTree], Any], examples: PyTree, count: int, bytes_per_example: float
) -> Any:
    """The results for all examples, stacked."""
    chunk = chunk_of(count, bytes_per_example)
    if chunk == count:
        return jax.vmap(fun)(examples)
    return lax.map(fun, examples, batch_size=chunk)


def sum_chunks(
    fun: Callable[[PyTree], Any], examples: PyTree, count: int, bytes_per_example: float
) -> Any:
    """The sum of a function of several examples, `(chunk, ...)`, over all chunks."""
    chunk = chunk_of(count, bytes_per_example)
    full = count - count % chunk
    if chunk == count:
        return fun(examples)

    def add(total: Any, part: PyTree) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, fun(part)), None

    rest = jax.tree.map(lambda a: a[full:], examples)
    parts = jax.tree.map(lambda a: a[:full].reshape(-1, chunk, *a.shape[1:]), examples)
    shapes = jax.eval_shape(fun, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = lax.scan(add, zeros, parts)
    return total if full == count else jax.tree.map(jnp.add, total, fun(rest))
