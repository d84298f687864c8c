"""A walk over rows and classes in chunks, whose derivatives keep no chunk."""

from collections.abc import Callable
from functools import partial
from math import gcd, isqrt
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

Carry = TypeVar("Carry")
Start = int | Array

# Numbers of logits: 4 MB in float32 stay in a processor's caches, 64 MB keep an accelerator busy.
_SMALL, _LARGE = 2**20, 2**24


class Chunks(NamedTuple):
    """How an axis of `total` places is cut: into equal blocks, and each of them into chunks.

    A chunk has `size` consecutive places of every block, or all of them if that is `None`. With one
    block, chunks are consecutive.
    """

    total: Any  # symbolic in an export
    blocks: int
    size: int | None


class Grid(NamedTuple):
    """How rows and classes are cut."""

    rows: Chunks
    classes: Chunks


def choose_grid(
    rows: Any,
    classes: int,
    inputs: int,
    *,
    row_chunk_size: int | None,
    chunk_size: int | None,
    devices: int,
    at_least: int,
    all_rows: bool,
) -> Grid:
    """Chooses the sizes that are not given; a chunk has `at_least` so many classes.

    The logits of a chunk are no larger than the input, or `_SMALL`, and never than `_LARGE`, and
    its columns of the weight no larger than `_SMALL`, or square. With `all_rows`, something is
    computed for all rows and a chunk of classes, whatever `row_chunk_size` is.
    """
    # Devices may share the rows.
    share = -(-rows // devices) if isinstance(rows, int) else 0  # symbolic in an export
    at_a_time = share if row_chunk_size is None or all_rows else min(share, row_chunk_size)
    if chunk_size is None:
        chunk_size = max(1, inputs, _SMALL // max(1, inputs, at_a_time))
        if row_chunk_size is None and chunk_size * share > _LARGE:
            chunk_size = max(_LARGE // share, min(chunk_size, isqrt(_LARGE)))
        chunk_size = _without_rest(classes, chunk_size)
    chunk_size = max(chunk_size, at_least)
    if row_chunk_size is None and share:
        most = max(1, _LARGE // max(1, min(chunk_size, classes)))
        row_chunk_size = _without_rest(rows, most * devices) if share > most else None
    return Grid(_cut(rows, row_chunk_size, devices), _cut(classes, chunk_size, devices))


def chunk_lengths(chunks: Chunks) -> tuple[Any, ...]:
    """The numbers of places that a chunk may have."""
    if chunks.size is None:
        return (chunks.total,)
    rest = chunks.total // chunks.blocks % chunks.size
    return tuple(chunks.blocks * size for size in (chunks.size, rest) if size)


def _without_rest(total: int, size: int) -> int:
    """A divisor that is a little smaller, if there is one."""
    return next((s for s in range(size, size - size // 4, -1) if total % s == 0), size)


def _cut(total: Any, size: int | None, devices: int) -> Chunks:
    """Cuts an axis into chunks of at most `size`, or of one place of every block.

    An axis may be sharded over some of the devices in a way that only the compiler knows. Each
    shard then is made of whole blocks, so every chunk has an equal part of it, and nothing moves.
    """
    if size is None or not isinstance(total, int) or size >= total:
        return Chunks(total, 1, None)
    blocks = gcd(total, devices)
    return Chunks(total, blocks, max(1, size // blocks))


def walk(
    step: Callable[[PyTree, Carry], Carry],
    grid: Grid,
    operands: PyTree,
    names: Callable[[PyTree], PyTree],
    carry: Carry,
    *,
    of_columns: Callable[[PyTree, Array], PyTree],
) -> Carry:
    """Calls `step(operands, carry)` with some rows and classes of both, until all had their turn.

    `names(operands)` has a string for every array with the names of its axes; those called `"row"`
    and `"out"` are cut. The arrays of `carry` begin with the rows. All rows meet a chunk of classes
    before the next; `of_columns(operands, places)` makes of it what `step` gets rows of.
    Derivatives compute every step again, so that memory holds the operands of one.
    """

    def with_columns(start: Start, size: int | None, carry: Carry) -> Carry:
        columns = _take(operands, names(operands), "out", grid.classes, start, size)
        columns = of_columns(columns, _places(grid.classes, start, size))

        def with_rows(start: Start, size: int | None, carry: Carry) -> Carry:
            part = _take(columns, names(columns), "row", grid.rows, start, size)
            if size is None:
                return step(part, carry)
            kept: Carry = jax.tree.map(partial(_slice, grid.rows, start, size, 0), carry)
            done: Carry = jax.tree.map(partial(_put, grid.rows, start), carry, step(part, kept))
            return done

        return _for_chunks(grid.rows, with_rows, carry)

    return _for_chunks(grid.classes, with_columns, carry)


def _for_chunks(
    chunks: Chunks, body: Callable[[Start, int | None, Carry], Carry], carry: Carry
) -> Carry:
    again = jax.checkpoint(body, prevent_cse=False, static_argnums=1)
    if chunks.size is None:
        return again(0, None, carry)  # type: ignore[no-any-return]
    size, places = chunks.size, chunks.total // chunks.blocks
    number, rest = divmod(places, size)

    def scanned(carry: Carry, i: Array) -> tuple[Carry, None]:
        return again(i * size, size, carry), None

    carry, _ = lax.scan(scanned, carry, jnp.arange(number, dtype=jnp.int32))
    return again(places - rest, rest, carry) if rest else carry


def _take(
    tree: PyTree, names: PyTree, name: str, chunks: Chunks, start: Start, size: int | None
) -> PyTree:
    if size is None:
        return tree

    def take(array: Array, axes: str) -> Array:
        found = axes.split()
        return _slice(chunks, start, size, found.index(name), array) if name in found else array

    return jax.tree.map(take, tree, names)


def _places(chunks: Chunks, start: Start, size: int | None) -> Array:
    """The numbers of the places in a chunk."""
    if size is None:
        return jnp.arange(chunks.total, dtype=jnp.int32)
    first = jnp.arange(chunks.blocks, dtype=jnp.int32) * (chunks.total // chunks.blocks)
    places: Array = first[:, None] + start + jnp.arange(size, dtype=jnp.int32)
    return places.ravel()


def _slice(chunks: Chunks, start: Start, size: int, axis: int, array: Array) -> Array:
    blocks = _in_blocks(chunks, axis, array)
    part = lax.dynamic_slice_in_dim(blocks, start, size, axis + 1)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    return part.reshape(*before, chunks.blocks * size, *after)


def _put(chunks: Chunks, start: Start, array: Array, part: Array) -> Array:
    """Writes into the first axis."""
    blocks, update = _in_blocks(chunks, 0, array), _in_blocks(chunks, 0, part)
    updated: Array = lax.dynamic_update_slice_in_dim(blocks, update, start, 1)
    return updated.reshape(array.shape)


def _in_blocks(chunks: Chunks, axis: int, array: Array) -> Array:
    before, total, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    return array.reshape(*before, chunks.blocks, total // chunks.blocks, *after)
