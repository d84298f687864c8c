"""Gives values other atoms for one shape: to reshape them, and for operands to agree."""

from collections.abc import Container, Sequence
from fractions import Fraction
from itertools import chain, groupby
from math import prod

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fclayers.sliding.phases import NeedsPhases
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    axis_of,
    dense,
    per_dim,
    sections,
    step,
    window_atom,
)


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


def position_single_elements(grid: Grid, value: Value, axes: Container[int]) -> Value:
    """Turns window atoms of one element, along these window axes, into position axes."""
    for atom in value.atoms:
        if atom.axis is not None and atom.size == 1 and atom.axis in axes:
            value = _position(grid, value, atom)
    return value


def fuse(grid: Grid, value: Value) -> Value:
    """Makes one finer window atom of a window atom and the plain ones that follow it.

    That is what repeating does, and moving channels into the window.
    """
    shape, dims = list(value.leading), list[tuple[Atom, ...]]()
    for section in sections(dense(value)):
        (first, length), *rest = section or [(Atom(1), 1)]
        if rest and first.axis is not None and all(atom.axis is None for atom, _ in rest):
            q = step(grid, first)
            if q != first.pitch:
                raise NeedsPhases(first.axis, int(first.pitch // q))
            times = prod(atom.size for atom, _ in rest)
            finer = Atom(first.size * times, first.axis, Fraction(first.pitch) / times)
            shape.append(length * times)
            dims.append((finer,))
        else:
            shape += [length for _, length in section]
            dims.append(tuple(atom for atom, _ in section))
    return Value(dense(value).array.reshape(shape), tuple(dims), value.positions)


def drop_atom(value: Value, atom: Atom, array: Array) -> Value:
    """Moves a window atom's axis of an array, now one element per window, to the position axes."""
    axis = len(value.positions) + value.atoms.index(atom)
    positions = tuple(sorted((*value.positions, axis_of(atom))))
    array = jnp.moveaxis(array, axis, positions.index(axis_of(atom)))
    dims = tuple(tuple(other for other in dim if other != atom) for dim in value.dims)
    return Value(array, dims, positions)


def align(values: Sequence[Value], *, but: int | None = None) -> list[Value]:
    """Gives values of one shape the same atoms and lengths; `but` is a dimension to leave.

    Uniform atoms stay where all values have one, and are repeated where some do not.
    """
    if but is not None:
        values = [per_dim(value)[0] for value in values]
    common = [_common_atoms(dims) for dims in zip(*(value.dims for value in values), strict=True)]
    axes = [atom.axis for dim in common for atom in dim if atom.axis is not None]
    if len(set(axes)) < len(axes):
        raise Unshared("brings elements of the window together with each other")
    fitted = []
    for value in values:
        own = [value.dims[i] if i == but else dim for i, dim in enumerate(common)]
        fitted.append(_fit(value, own))
    atoms, lengths = [], []
    for options in zip(*(chain(*sections(value)) for value in fitted), strict=True):
        kinds = [option for option in options if not option[0].uniform] or options[:1]
        atoms.append(kinds[0][0])
        lengths.append(min(length for _, length in kinds))
    stretched = []
    for value in fitted:
        if but is not None:
            atoms[but], lengths[but] = Atom(value.shape[but]), value.shape[but]
        stretched.append(_stretch(value, atoms, lengths))
    return stretched


def align_per_dim(values: Sequence[Value]) -> list[Value]:
    """`align`, with one dense atom per dimension."""
    return [dense(per_dim(value)[0]) for value in align(values)]


def _merge_plain_runs(value: Value) -> Value:
    """One dimension for every window atom, and for every run of other atoms."""
    shape, merged, atoms = list(value.leading), list(value.leading), []
    by_kind = groupby(chain(*sections(value)), lambda section: section[0].axis is not None)
    for is_window, run in by_kind:
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
    shape, fitted, dims = list(value.leading), list(value.leading), []
    for section, target in zip(sections(value), targets, strict=True):
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
