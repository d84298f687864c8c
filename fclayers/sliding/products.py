"""The rule for dot_general; over window axes, the fully connected layer is a convolution."""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.jaxprs import aval, bind_one
from fclayers.kernels.convolution import convolve
from fclayers.kernels.windows import Geometry
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    axis_of,
    dense,
    over_positions,
    step,
)


def dot_general(grid: Grid, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    (lhs_contracted, rhs_contracted), _ = eqn.params["dimension_numbers"]
    lhs, rhs = dense(lhs), dense(rhs)
    match _has_window(lhs, lhs_contracted), _has_window(rhs, rhs_contracted):
        case False, False:
            return _dot_inside(eqn, lhs, rhs)
        case True, False:
            return _dot_over_windows(grid, eqn, lhs, rhs, lhs_contracted, rhs_contracted)
        case False, True:
            swapped = _dot_over_windows(grid, eqn, rhs, lhs, rhs_contracted, lhs_contracted)
            return _move_first_dims_back(swapped, len(rhs.dims) - len(rhs_contracted))
    raise Unshared("multiplies two values along the window")


def _dot_inside(eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    """No window axis is contracted; they stay where they are."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    axes = [{atom.axis for atom in value.atoms if atom.axis is not None} for value in (lhs, rhs)]
    if axes[0] & axes[1] or _has_window(lhs, lhs_batch) or _has_window(rhs, rhs_batch):
        raise Unshared("multiplies elements of the window with each other")
    lhs, lhs_axes = _merge_dims(lhs, (*lhs_contracted, *lhs_batch))
    rhs, rhs_axes = _merge_dims(rhs, (*rhs_contracted, *rhs_batch))
    numbers = tuple(
        (tuple(lhs_axes[i] for i in left), tuple(rhs_axes[i] for i in right))
        for left, right in ((lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch))
    )
    array, positions = over_positions(
        lambda lhs, rhs: bind_one(eqn, lhs, rhs, dimension_numbers=numbers), lhs, rhs
    )
    dims = [lhs.dims[i] for i in lhs_batch]
    dims += [d for i, d in enumerate(lhs.dims) if i not in (*lhs_contracted, *lhs_batch)]
    dims += [d for i, d in enumerate(rhs.dims) if i not in (*rhs_contracted, *rhs_batch)]
    return Value(array, tuple(dims), positions)


def _dot_over_windows(
    grid: Grid,
    eqn: JaxprEqn,
    shared: Value,
    other: Value,
    shared_contracted: Sequence[int],
    other_contracted: Sequence[int],
) -> Value:
    """A convolution whose kernel is the other operand, as large as the map."""
    if eqn.params["dimension_numbers"][1][0]:
        raise Unshared("multiplies a batch of matrices over the window")
    if any(atom.axis is not None for atom in other.atoms):
        raise Unshared("multiplies two values that both vary inside the window")
    _check_is_a_convolution(eqn, shared.array, other.array)
    contracted = [atom for i in shared_contracted for atom in shared.dims[i]]
    windows = [atom for atom in contracted if atom.axis is not None]
    shared_free = [dim for i, dim in enumerate(shared.dims) if i not in shared_contracted]
    axes = _axes_of(shared)
    free_axes = [axis for i, dim in enumerate(axes) if i not in shared_contracted for axis in dim]
    contracted_axes = [axis for i in shared_contracted for axis in axes[i]]
    by_atom = list(zip(contracted_axes, contracted, strict=True))
    window_axes = [axis for axis, atom in by_atom if atom.axis is not None]
    plain_axes = [axis for axis, atom in by_atom if atom.axis is None]
    other, other_axes = _merge_dims(other, other_contracted)
    other_free = [dim for i, dim in enumerate(other.dims) if i not in other_contracted]

    geometry = Geometry(
        tuple(atom.size for atom in windows),
        tuple(grid.stride[axis_of(atom)] // step(grid, atom) for atom in windows),
        ((0, 0),) * len(windows),
        tuple(atom.pitch // step(grid, atom) for atom in windows),
    )
    dtype = aval(eqn.outvars[0]).dtype
    counts = [grid.counts[axis_of(atom)] for atom in windows]

    def multiply(shared: Array, other: Array) -> Array:
        free_lengths = [shared.shape[axis] for axis in free_axes]
        maps = shared.transpose(*free_axes, *window_axes, *plain_axes)
        lengths = [shared.shape[axis] for axis in window_axes]
        maps = maps.reshape(prod(free_lengths), *lengths, -1)
        kernel = _kernel(other, [other_axes[i] for i in other_contracted], contracted)
        if not jnp.issubdtype(dtype, jnp.inexact):
            maps, kernel = maps.astype(dtype), kernel.astype(dtype)
        y = convolve(maps, kernel, geometry, 1, eqn.params["precision"]).astype(dtype)
        y = lax.slice(y, [0] * y.ndim, [y.shape[0], *counts, y.shape[-1]])
        y = jnp.moveaxis(y, range(1, 1 + len(windows)), range(len(windows)))
        return y.reshape(*counts, *free_lengths, *(a.size for dim in other_free for a in dim))

    array, positions = over_positions(multiply, shared, other)
    order = [*positions, *map(axis_of, windows)]
    array = array.transpose(*np.argsort(order), *range(len(order), array.ndim))
    return Value(array, (*shared_free, *other_free), tuple(sorted(order)))


def _check_is_a_convolution(eqn: JaxprEqn, lhs: Array, rhs: Array) -> None:
    """Declines dtypes and precisions for which products and convolutions differ."""
    out, precision = aval(eqn.outvars[0]).dtype, eqn.params["precision"]
    inexact = lhs.dtype == rhs.dtype and out in (lhs.dtype, accumulation_dtype(lhs.dtype))
    integers = all(jnp.issubdtype(dtype, jnp.integer) for dtype in (lhs.dtype, rhs.dtype, out))
    if not ((inexact and jnp.issubdtype(out, jnp.inexact)) or integers):
        raise Unshared(f"multiplies {lhs.dtype} and {rhs.dtype} to {out} over the window")
    levels = precision if isinstance(precision, tuple) else (precision,)
    if not all(level is None or isinstance(level, lax.Precision) for level in levels):
        raise Unshared(f"multiplies with the precision {precision} over the window")


def _kernel(array: Array, contracted_axes: Sequence[int], atoms: Sequence[Atom]) -> Array:
    """The other operand as (*window, plain atoms, outputs)."""
    rest = [axis for axis in range(array.ndim) if axis not in contracted_axes]
    outputs = prod(array.shape[axis] for axis in rest)
    array = array.transpose(*contracted_axes, *rest)
    array = array.reshape(*(atom.size for atom in atoms), outputs)
    windows = [i for i, atom in enumerate(atoms) if atom.axis is not None]
    plain = [i for i, atom in enumerate(atoms) if atom.axis is None]
    array = array.transpose(*windows, *plain, len(atoms))
    return array.reshape(*(atoms[i].size for i in windows), -1, outputs)


def _merge_dims(value: Value, dims: Sequence[int]) -> tuple[Value, dict[int, int]]:
    """Gives each of these dimensions one array axis; returns which."""
    lengths = iter(value.lengths)
    shape: list[int] = []
    merged: list[tuple[Atom, ...]] = []
    axes = {}
    for i, dim in enumerate(value.dims):
        own = [next(lengths) for _ in dim]
        if i in dims:
            axes[i] = len(shape)
            shape.append(prod(own))
            merged.append((Atom(prod(own)),))
        else:
            shape += own
            merged.append(dim)
    array = value.array.reshape(*value.leading, *shape)
    return Value(array, tuple(merged), value.positions), axes


def _move_first_dims_back(value: Value, count: int) -> Value:
    start = len(value.positions)
    moved = sum(map(len, value.dims[:count]))
    axes = range(start, value.array.ndim)
    array = value.array.transpose(*range(start), *axes[moved:], *axes[:moved])
    return Value(array, (*value.dims[count:], *value.dims[:count]), value.positions)


def _axes_of(value: Value) -> list[list[int]]:
    """For every dimension the axes of its atoms, without the position axes."""
    axes = iter(range(len(value.atoms)))
    return [[next(axes) for _ in dim] for dim in value.dims]


def _has_window(value: Value, dims: Sequence[int]) -> bool:
    return any(atom.axis is not None for i in dims for atom in value.dims[i])
