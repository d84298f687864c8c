"""Arrays that stand for a value of every window at once.

A value of the function for one window has a shape. Its dimensions are products of *atoms*. Most
atoms are plain. A *window atom* runs along a window axis of the image: its elements are `pitch`
pixels apart, and the array holds, once, the elements of all windows along that axis. Neighbours in
the array are `gcd(stride, pitch)` pixels apart, so element `j` of window `i` is in the array at

    (i * stride + j * pitch) / gcd(stride, pitch).

A *uniform* atom is the same everywhere, and has size 1 in the array. When nothing of a window axis
is left inside the window, the axis is a *position axis*: the array then has it in front, with one
element per window. A value with neither is a constant.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import gcd, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


class Unshared(Exception):  # noqa: N818 (an outcome, not an error)
    """Why a step of the function cannot be shared between windows."""


class Grid(NamedTuple):
    """Where the windows lie: one entry per window axis of the image."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    counts: tuple[int, ...]
    pads_image: bool


class Atom(NamedTuple):
    """A factor of a dimension; `axis` is the window axis it runs along, if it does."""

    size: int
    axis: int | None = None
    pitch: int = 0
    uniform: bool = False


class Value(NamedTuple):
    """An array with the position axes in front, then one axis per atom; the atoms by dimension."""

    array: Array
    dims: tuple[tuple[Atom, ...], ...]
    positions: tuple[int, ...] = ()

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(atom for dim in self.dims for atom in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def is_constant(self) -> bool:
        return not self.positions and all(atom.axis is None for atom in self.atoms)


def constant(array: Any) -> Value:
    array = jnp.asarray(array)
    return make_value(array, [Atom(size) for size in array.shape])


def axis_of(atom: Atom) -> int:
    """The window axis of a window atom."""
    assert atom.axis is not None
    return atom.axis


def step(grid: Grid, atom: Atom) -> int:
    """Pixels between neighbours in the array."""
    return gcd(grid.stride[axis_of(atom)], atom.pitch)


def window_atom(grid: Grid, size: int, axis: int, pitch: int) -> Atom:
    """One element alone needs no pitch; the stride as its pitch skips all between two windows."""
    alone = size == 1 and not grid.pads_image
    return Atom(size, axis, grid.stride[axis] if alone else pitch)


def make_value(array: Array, atoms: Sequence[Atom], positions: tuple[int, ...] = ()) -> Value:
    """A value with one atom per dimension; a plain dimension of size 1 has none."""
    dims = tuple(() if atom.axis is None and atom.size == 1 else (atom,) for atom in atoms)
    start = len(positions)
    lengths = [n for n, dim in zip(array.shape[start:], dims, strict=True) if dim]
    return Value(array.reshape(*array.shape[:start], *lengths), dims, positions)


def per_dim(value: Value) -> tuple[Value, list[Atom]]:
    """The value with one array axis and one atom per dimension, for rules that need no more."""
    shape, merged, atoms = [], [], []
    for section in _sections(value):
        if len(section) == 1:
            ((atom, length),) = section
            shape.append(length)
            merged.append(length)
        elif any(atom.axis is not None for atom, _ in section):
            raise Unshared("window axes are merged with others")
        else:
            atom = Atom(prod(atom.size for atom, _ in section))
            shape += [atom.size for atom, _ in section]
            merged.append(atom.size)
        atoms.append(atom)
    leading = value.array.shape[: len(value.positions)]
    array = jnp.broadcast_to(value.array, (*leading, *shape)).reshape(*leading, *merged)
    return Value(array, tuple((atom,) for atom in atoms), value.positions), atoms


def dense(value: Value) -> Value:
    """The value without uniform atoms."""
    lengths = [
        atom.size if atom.uniform else length for dim in _sections(value) for atom, length in dim
    ]
    array = jnp.broadcast_to(value.array, (*value.array.shape[: len(value.positions)], *lengths))
    dims = tuple(tuple(atom._replace(uniform=False) for atom in dim) for dim in value.dims)
    return Value(array, dims, value.positions)


def whole(value: Value) -> Value:
    """A value without window atoms, with one plain array axis for every dimension."""
    leading = value.array.shape[: len(value.positions)]
    array = dense(value).array.reshape(*leading, *value.shape)
    return Value(array, tuple((Atom(size),) for size in value.shape), value.positions)


def reshape(grid: Grid, value: Value, shape: Sequence[int]) -> Value:
    """Groups the atoms anew; plain runs are merged and split, window atoms only split."""
    value = position_single_elements(grid, value, range(len(grid.window)))
    value = _merge_plain_runs(value)
    rest, array = list(value.atoms), value.array
    dims = []
    axis = len(value.positions)
    for size in shape:
        dim: list[Atom] = []
        while size > 1:
            atom = rest.pop(0)
            if atom.size > size:
                if atom.size % size:
                    raise Unshared("a reshape splits window axes unevenly")
                array, atom, inner = _split(grid, array, axis, atom, size)
                rest.insert(0, inner)
            elif size % atom.size:
                raise Unshared("a reshape splits window axes unevenly")
            dim.append(atom)
            size //= atom.size
            axis += 1
        dims.append(tuple(dim))
    return Value(array, tuple(dims), value.positions)


def position_single_elements(grid: Grid, value: Value, axes: Sequence[int] | range) -> Value:
    """Turns window atoms of one element, along these window axes, into position axes."""
    for atom in value.atoms:
        if atom.axis is not None and atom.size == 1 and atom.axis in axes:
            value = _position(grid, value, atom)
    return value


def over_positions(function: Callable[..., Any], *values: Value) -> tuple[Any, tuple[int, ...]]:
    """Maps a function of the arrays over the position axes; returns its result and the axes."""
    positions = tuple(sorted({axis for value in values for axis in value.positions}))
    if any(atom.axis in positions for value in values for atom in value.atoms):
        raise Unshared("a value of a whole window meets values inside the window")
    for axis in reversed(positions):
        in_axes = tuple(0 if axis in value.positions else None for value in values)
        function = jax.vmap(function, in_axes=in_axes)
    return function(*(value.array for value in values)), positions


def align(grid: Grid, values: Sequence[Value], *, but: int | None = None) -> list[Value]:
    """Gives values of one shape the same atoms and lengths; `but` is a dimension left as it is.

    Uniform atoms stay where all values have one, and are repeated where some do not.
    """
    if but is not None:
        values = [per_dim(value)[0] for value in values]
    common = [_common_atoms(dims) for dims in zip(*(value.dims for value in values), strict=True)]
    fitted = []
    for value in values:
        own = [value.dims[i] if i == but else dim for i, dim in enumerate(common)]
        fitted.append(_fit(value, own))
    columns = zip(
        *([section for dim in _sections(v) for section in dim] for v in fitted), strict=True
    )
    atoms, lengths = [], []
    for options in columns:
        kinds = [option for option in options if not option[0].uniform] or options[:1]
        atoms.append(kinds[0][0])
        lengths.append(min(length for _, length in kinds))
    stretched = []
    for value in fitted:
        if but is not None:
            atoms[but], lengths[but] = Atom(value.shape[but]), value.shape[but]
        stretched.append(_stretch(value, atoms, lengths))
    return stretched


def cut_windows(grid: Grid, value: Value) -> Array:
    """Every window's value, position axes of all window axes in front."""
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


def cut_window(grid: Grid, value: Value, position: Any) -> Array:
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


def _sections(value: Value) -> list[list[tuple[Atom, int]]]:
    """For every dimension its atoms, each with its length in the array."""
    lengths = iter(value.array.shape[len(value.positions) :])
    return [[(atom, next(lengths)) for atom in dim] for dim in value.dims]


def _merge_plain_runs(value: Value) -> Value:
    """One dimension for every window atom, and for every run of other atoms."""
    leading = value.array.shape[: len(value.positions)]
    sections = [section for dim in _sections(value) for section in dim]
    shape, merged, atoms = list(leading), list(leading), []
    for is_window, run in groupby(sections, lambda section: section[0].axis is not None):
        members = list(run)
        if is_window:
            atoms += [atom for atom, _ in members]
            lengths = [length for _, length in members]
            merged += lengths
        else:
            uniform = all(atom.uniform for atom, _ in members)
            size = prod(atom.size for atom, _ in members)
            lengths = [1 if uniform else atom.size for atom, _ in members]
            if size > 1:
                atoms.append(Atom(size, uniform=uniform))
                merged.append(prod(lengths))
        shape += lengths
    array = jnp.broadcast_to(value.array, shape).reshape(merged)
    return Value(array, tuple((atom,) for atom in atoms), value.positions)


def _split(
    grid: Grid, array: Array, axis: int, atom: Atom, outer_size: int
) -> tuple[Array, Atom, Atom]:
    """Splits an atom in two; of a window atom, the inner one is cut out and plain."""
    inner_size = atom.size // outer_size
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    if atom.axis is None:
        sizes = (1, 1) if atom.uniform else (outer_size, inner_size)
        outer, inner = (
            Atom(outer_size, uniform=atom.uniform),
            Atom(inner_size, uniform=atom.uniform),
        )
        return array.reshape(*before, *sizes, *after), outer, inner
    outer = window_atom(grid, outer_size, atom.axis, atom.pitch * inner_size)
    q = step(grid, atom)
    stride = step(grid, outer) // q
    shift = atom.pitch // q
    span = (array.shape[axis] - shift * (inner_size - 1) - 1) // stride * stride + 1
    parts = [
        lax.slice_in_dim(array, shift * j, shift * j + span, stride, axis)
        for j in range(inner_size)
    ]
    return jnp.stack(parts, axis + 1), outer, Atom(inner_size)


def _position(grid: Grid, value: Value, atom: Atom) -> Value:
    axis = len(value.positions) + value.atoms.index(atom)
    stride = grid.stride[axis_of(atom)] // step(grid, atom)
    end = (grid.counts[axis_of(atom)] - 1) * stride + 1
    return drop_atom(value, atom, lax.slice_in_dim(value.array, 0, end, stride, axis))


def drop_atom(value: Value, atom: Atom, array: Array) -> Value:
    """Moves a window atom's axis of an array, now one element per window, to the position axes."""
    axis = len(value.positions) + value.atoms.index(atom)
    positions = tuple(sorted((*value.positions, axis_of(atom))))
    array = jnp.moveaxis(array, axis, positions.index(axis_of(atom)))
    dims = tuple(tuple(other for other in dim if other != atom) for dim in value.dims)
    return Value(array, dims, positions)


def _common_atoms(candidates: Sequence[tuple[Atom, ...]]) -> tuple[Atom, ...]:
    """The atoms of one dimension that all values can have: those with windows, or one plain."""
    for dim in candidates:
        if any(atom.axis is not None for atom in dim):
            return dim
    sized = [dim for dim in candidates if dim]
    if all(dim == sized[0] for dim in sized) and sized:
        return tuple(Atom(atom.size) for atom in sized[0])
    return (Atom(prod(atom.size for atom in sized[0])),) if sized else ()


def _fit(value: Value, targets: Sequence[tuple[Atom, ...]]) -> Value:
    """Splits and merges a value's atoms until they are the targets, or uniform."""
    leading = value.array.shape[: len(value.positions)]
    shape, fitted, dims = list(leading), list(leading), []
    for section, target in zip(_sections(value), targets, strict=True):
        sizes = [atom.size for atom in target]
        if all(atom.uniform for atom, _ in section):
            atoms = tuple(Atom(size, uniform=True) for size in sizes)
            shape += [1] * len(section)
            fitted += [1] * len(sizes)
        elif [atom.size for atom, _ in section] == sizes:
            atoms = tuple(atom for atom, _ in section)
            lengths = [length for _, length in section]
            shape += lengths
            fitted += lengths
        elif any(atom.axis is not None for atom, _ in section):
            raise Unshared("window axes are merged with others in two different ways")
        else:
            atoms = tuple(Atom(size) for size in sizes)
            shape += [atom.size for atom, _ in section]
            fitted += sizes
        for ours, theirs in zip(atoms, target, strict=True):
            if not ours.uniform and (ours.axis, ours.pitch) != (theirs.axis, theirs.pitch):
                raise Unshared(_why_different(value, ours))
        dims.append(atoms)
    array = jnp.broadcast_to(value.array, shape).reshape(fitted)
    return Value(array, tuple(dims), value.positions)


def _stretch(value: Value, atoms: Sequence[Atom], lengths: Sequence[int]) -> Value:
    """Gives a value these atoms, cutting windows and repeating uniform ones to these lengths."""
    array, start = value.array, len(value.positions)
    for axis, (atom, length) in enumerate(zip(value.atoms, lengths, strict=True), start):
        if not atom.uniform:
            array = lax.slice_in_dim(array, 0, length, axis=axis)
    array = jnp.broadcast_to(array, (*array.shape[:start], *lengths))
    rest = iter(atoms)
    return Value(
        array, tuple(tuple(next(rest) for _ in dim) for dim in value.dims), value.positions
    )


def _why_different(value: Value, atom: Atom) -> str:
    if value.is_constant:
        return "a constant varies across the window"
    if atom.axis is None:
        return "a value of a whole window meets values inside the window"
    return "values meet that lie differently in the window"


def _places(grid: Grid, atom: Atom) -> np.ndarray:
    """Where the elements of every window are in the array: (windows, elements)."""
    q = step(grid, atom)
    starts = np.arange(grid.counts[axis_of(atom)]) * (grid.stride[axis_of(atom)] // q)
    return starts[:, None] + np.arange(atom.size) * (atom.pitch // q)
