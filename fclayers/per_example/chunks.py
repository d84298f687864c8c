"""Functions of one example on all of a batch, in chunks of bounded memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

# What is computed for some examples at a time takes about this much memory.
CHUNK_BYTES = 2**24
# Of products that are made and reduced at once: on CPUs, what stays in the caches.
CACHED_BYTES = 2**21


def chunk_of(count: int, bytes_per_example: float, chunk_bytes: int | None = None) -> int:
    """How many examples are computed at a time."""
    chunk_bytes = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    return int(min(count, max(1, chunk_bytes // max(1, bytes_per_example))))


def map_examples(
    fun: Callable[[PyTree], Any],
    examples: PyTree,
    count: int,
    bytes_per_example: float,
    chunk_bytes: int | None = None,
) -> Any:
    """The results for all examples, stacked."""
    chunk = chunk_of(count, bytes_per_example, chunk_bytes)
    if chunk == count:
        return jax.vmap(fun)(examples)
    return lax.map(fun, examples, batch_size=chunk)


def map_in_cache(
    fun: Callable[[PyTree], Any], examples: PyTree, count: int, bytes_per_example: float
) -> Any:
    """The results for all examples, stacked; on CPUs, a chunk stays in the caches."""

    def by(chunk_bytes: int) -> Callable[[PyTree], Any]:
        return lambda examples: map_examples(fun, examples, count, bytes_per_example, chunk_bytes)

    small, large = min(CACHED_BYTES, CHUNK_BYTES), CHUNK_BYTES
    if chunk_of(count, bytes_per_example, small) == chunk_of(count, bytes_per_example, large):
        return by(large)(examples)
    return lax.platform_dependent(examples, cpu=by(small), default=by(large))


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
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a), shapes)
    total, _ = lax.scan(add, zeros, parts)
    return total if full == count else jax.tree.map(jnp.add, total, fun(rest))
