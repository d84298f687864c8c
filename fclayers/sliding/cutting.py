"""Cuts windows out of values, all at once or one at a time."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers.sliding.phases import join_phases, split_grid
from fclayers.sliding.pieces import Index, Pieces
from fclayers.sliding.values import Atom, Grid, Value, axis_of, dense, step


def cut_windows(grid: Grid, value: Value | Pieces) -> Array:
    """Every window's value; all window axes are position axes, in front."""
    if isinstance(value, Pieces):
        parts = {index: cut_windows(grid, block) for index, block in value.blocks.items()}
        return _join(value, parts, (*grid.counts, *value.shape), len(grid.counts))
    if value.phases:
        inner = split_grid(grid, dict(value.phases))

        def cut(array: Array) -> Array:
            return cut_windows(inner, value._replace(array=array, phases=()))

        for _ in value.phases:
            cut = jax.vmap(cut)
        return join_phases(grid, cut(value.array), value.phases)
    array = dense(value).array
    axis = len(value.positions)
    places = list(value.positions)
    for atom in value.atoms:
        if atom.axis is None:
            axis += 1
            continue
        index = _places(grid, atom)
        array = jnp.take(array, index, axis=axis, mode="clip")
        array = jnp.moveaxis(array, axis, len(places))
        places.append(atom.axis)
        axis += 2
    order = sorted(range(len(places)), key=places.__getitem__)
    array = array.transpose(*order, *range(len(places), array.ndim))
    for window_axis, count in enumerate(grid.counts):
        if window_axis not in places:
            array = jnp.expand_dims(array, window_axis)
            repeated = (*array.shape[:window_axis], count, *array.shape[window_axis + 1 :])
            array = jnp.broadcast_to(array, repeated)
    return array.reshape(*grid.counts, *value.shape)


def cut_window(grid: Grid, value: Value | Pieces, position: Sequence[Array]) -> Array:
    """One window's value, at a position that may be traced."""
    if isinstance(value, Pieces):
        parts = {i: cut_window(grid, block, position) for i, block in value.blocks.items()}
        return _join(value, parts, value.shape, 0)
    if value.phases:
        array, inside = value.array, list(position)
        for axis, count in value.phases:
            array = lax.dynamic_index_in_dim(array, position[axis] % count, 0, keepdims=False)
            inside[axis] = position[axis] // count
        inner = split_grid(grid, dict(value.phases))
        return cut_window(inner, value._replace(array=array, phases=()), inside)
    array = dense(value).array
    for axis in value.positions:
        array = lax.dynamic_index_in_dim(array, position[axis], 0, keepdims=False)
    for axis, atom in enumerate(value.atoms):
        if atom.axis is not None:
            q = step(grid, atom)
            start = position[atom.axis] * int(grid.stride[atom.axis] // q)
            length = (atom.size - 1) * int(atom.pitch // q) + 1
            array = lax.dynamic_slice_in_dim(array, start, length, axis)
            array = lax.slice_in_dim(array, 0, length, int(atom.pitch // q), axis)
    return array.reshape(value.shape)


def _join(
    pieces: Pieces, parts: Mapping[Index, Array], shape: tuple[int, ...], start: int
) -> Array:
    """The whole array; its axes for factors begin at `start`."""
    for factor in reversed(range(len(pieces.factors))):
        rows: dict[Index, list[Array]] = {}
        for index in sorted(parts):
            rows.setdefault(index[:factor], []).append(parts[index])
        parts = {index: jnp.concatenate(row, start + factor) for index, row in rows.items()}
    return parts[()].reshape(shape)


def _places(grid: Grid, atom: Atom) -> np.ndarray:
    """Where the elements of every window are in the array: (windows, elements)."""
    q = step(grid, atom)
    starts = np.arange(grid.counts[axis_of(atom)]) * int(grid.stride[axis_of(atom)] // q)
    return starts[:, None] + np.arange(atom.size) * int(atom.pitch // q)
