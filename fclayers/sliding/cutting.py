"""Cuts windows out of values, all at once or one at a time."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers.sliding.values import Atom, Grid, Value, axis_of, dense, step


def cut_windows(grid: Grid, value: Value) -> Array:
    """Every window's value; all window axes are position axes, in front."""
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


def cut_window(grid: Grid, value: Value, position: Sequence[Array]) -> Array:
    """One window's value, at a position that may be traced."""
    array = dense(value).array
    for axis in value.positions:
        array = lax.dynamic_index_in_dim(array, position[axis], 0, keepdims=False)
    for axis, atom in enumerate(value.atoms):
        if atom.axis is not None:
            q = step(grid, atom)
            start = position[atom.axis] * (grid.stride[atom.axis] // q)
            length = (atom.size - 1) * (atom.pitch // q) + 1
            array = lax.dynamic_slice_in_dim(array, start, length, axis)
            array = lax.slice_in_dim(array, 0, length, atom.pitch // q, axis)
    return array.reshape(value.shape)


def _places(grid: Grid, atom: Atom) -> np.ndarray:
    """Where the elements of every window are in the array: (windows, elements)."""
    q = step(grid, atom)
    starts = np.arange(grid.counts[axis_of(atom)]) * (grid.stride[axis_of(atom)] // q)
    return starts[:, None] + np.arange(atom.size) * (atom.pitch // q)
