"""Splits the positions of windows into phases, as decoders need it.

After a pool of stride 2, every element is kept, because windows at odd positions need those in
between. Upsampling inserts elements between the ones that a window sees, and cannot have both. So
the positions are split: windows whose offsets differ by a multiple of the pitch are in one phase,
see the same elements, and each phase is an array without dilation.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fclayers.sliding.values import Atom, Grid, Value, step


class NeedsPhases(Exception):
    """Raised by a function that needs `count` times as many phases along a window axis."""

    def __init__(self, axis: int, count: int) -> None:
        """Names the axis and the count."""
        self.axis, self.count = axis, count


def over_phases(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function of the grid and values without phases over the phases of values.

    The function returns a value or a list of values.
    """

    @wraps(function)
    def mapped(grid: Grid, *args: Any, **kwargs: Any) -> Any:
        values = [arg for arg in args if isinstance(arg, Value)]
        phases: dict[int, int] = {}
        for axis, count in (pair for value in values for pair in value.phases):
            phases[axis] = lcm(phases.get(axis, 1), count)
        while True:
            try:
                return _map_phases(function, grid, phases, args, kwargs)
            except NeedsPhases as need:
                phases = phases | {need.axis: phases.get(need.axis, 1) * need.count}

    return mapped


def split_grid(grid: Grid, phases: dict[int, int]) -> Grid:
    """The windows of one phase; the last of them may lie beyond the image."""
    counts = [phases.get(axis, 1) for axis in range(len(grid.window))]
    return grid._replace(
        stride=tuple(s * d for s, d in zip(grid.stride, counts, strict=True)),
        counts=tuple(-(-n // d) for n, d in zip(grid.counts, counts, strict=True)),
    )


def join_phases(grid: Grid, array: Array, phases: Sequence[tuple[int, int]]) -> Array:
    """Moves phase axes, in front of an axis for each window axis, between the positions again."""
    for axis, count in reversed(phases):
        # The phases that are left are in front.
        held = sum(other < axis for other, _ in phases)
        place = held + axis
        array = jnp.moveaxis(array, held, place + 1)
        merged = (*array.shape[:place], array.shape[place] * count, *array.shape[place + 2 :])
        array = lax.slice_in_dim(array.reshape(merged), 0, grid.counts[axis], axis=place)
    return array


def _map_phases(
    function: Callable[..., Any],
    grid: Grid,
    phases: dict[int, int],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    if not phases:
        return function(grid, *args, **kwargs)
    split = {i: _split(grid, arg, phases) for i, arg in enumerate(args) if isinstance(arg, Value)}
    inner = split_grid(grid, phases)
    found: list[Any] = []

    def run(*arrays: Array) -> list[Array]:
        values = {
            i: value._replace(array=array, phases=())
            for (i, value), array in zip(split.items(), arrays, strict=True)
        }
        found[:] = [function(inner, *(values.get(i, arg) for i, arg in enumerate(args)), **kwargs)]
        return [value.array for value in _as_list(found[0])]

    mapped: Callable[..., list[Array]] = run
    for axis in sorted(phases, reverse=True):
        in_axes = tuple(0 if axis in dict(value.phases) else None for value in split.values())
        mapped = jax.vmap(mapped, in_axes=in_axes)
    arrays = mapped(*(value.array for value in split.values()))
    kept = tuple(sorted(phases.items()))
    results = [
        value._replace(array=array, phases=kept)
        for value, array in zip(_as_list(found[0]), arrays, strict=True)
    ]
    return results if isinstance(found[0], list) else results[0]


def _as_list(results: Any) -> list[Value]:
    return results if isinstance(results, list) else [results]


def _split(grid: Grid, value: Value, phases: dict[int, int]) -> Value:
    """Gives a value these phases, along the window axes that it varies along."""
    varying = {*value.positions, *(atom.axis for atom in value.atoms)}
    for axis, count in phases.items():
        more = count // dict(value.phases).get(axis, 1)
        if more > 1 and axis in varying:
            value = _split_axis(grid, value, axis, more)
    return value


def _split_axis(grid: Grid, value: Value, axis: int, count: int) -> Value:
    """Splits every phase of a window axis into `count` phases."""
    held = dict(value.phases)
    before = split_grid(grid, held)
    after = split_grid(before, {axis: count})
    start = len(held)
    places: dict[int, Atom | None] = {
        i: None for i, other in enumerate(value.positions, start) if other == axis
    }
    places |= {
        i: atom
        for i, atom in enumerate(value.atoms, start + len(value.positions))
        if atom.axis == axis
    }
    parts = []
    for phase in range(count):
        part = value.array
        for place, along in places.items():
            part = _cut_phase(part, place, *_run_of_phase(before, after, axis, along, phase))
        parts.append(part)
    if axis in held:
        place = list(held).index(axis)
        array = jnp.stack(parts, place)
        array = array.reshape(*array.shape[:place], -1, *array.shape[place + 2 :])
    else:
        place = sum(other < axis for other in held)
        array = jnp.stack(parts, place)
    held[axis] = held.get(axis, 1) * count
    return value._replace(array=array, phases=tuple(sorted(held.items())))


def _run_of_phase(
    before: Grid, after: Grid, axis: int, atom: Atom | None, phase: int
) -> tuple[int, int, int]:
    """Where a phase starts on the array, the distance between its elements, and their number.

    Without an atom it is a position axis.
    """
    count, last = after.stride[axis] // before.stride[axis], after.counts[axis] - 1
    if atom is None:
        return phase, count, last + 1
    old, new = step(before, atom), step(after, atom)
    span = last * after.stride[axis] + (atom.size - 1) * atom.pitch
    return int(phase * before.stride[axis] // old), int(new // old), int(span // new) + 1


def _cut_phase(array: Array, place: int, first: int, apart: int, length: int) -> Array:
    stop = first + (length - 1) * apart + 1
    if stop > array.shape[place]:
        # Windows beyond the image are dropped in the end; they see the image from its start.
        widths = [(0, stop - n if axis == place else 0) for axis, n in enumerate(array.shape)]
        array = jnp.pad(array, widths, mode="wrap")
    return lax.slice_in_dim(array, first, stop, apart, place)
