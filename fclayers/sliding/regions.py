"""Cuts and joins segments of values in pieces, and runs rules on their blocks."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array

from fclayers._util.jaxprs import bind
from fclayers._util.trees import abstract
from fclayers.sliding.layout import reshape
from fclayers.sliding.phases import over_phases
from fclayers.sliding.pieces import (
    Cuts,
    Pieces,
    concrete,
    in_pieces,
    indices,
    kind,
    one_factor,
    starts,
)
from fclayers.sliding.run_rule import run_rule
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    axis_of,
    constant,
    step,
    while_tracing,
)

Avals = tuple[tuple[tuple[int, ...], np.dtype], ...]


class Slice(NamedTuple):
    """Elements of one segment."""

    segment: int
    start: int
    stop: int
    stride: int = 1


class Region(NamedTuple):
    """A new segment: slices that are joined. `spread` gives every window its own copy."""

    slices: tuple[Slice, ...]
    spread: bool = False

    @property
    def size(self) -> int:
        return sum(len(range(s.start, s.stop, s.stride)) for s in self.slices)


def slices_of(cuts: Cuts, start: int, stop: int, stride: int = 1) -> tuple[Slice, ...]:
    """Elements of a factor, by segment."""
    found = []
    for segment, (first, size) in enumerate(zip(starts(cuts), cuts, strict=True)):
        begin = max(start, first + (start - first) % stride)
        end = min(stop, first + size)
        if begin < end:
            found.append(Slice(segment, begin - first, end - first, stride))
    return tuple(found)


def select(grid: Grid, pieces: Pieces, factor: int, regions: Sequence[Region]) -> Pieces:
    """Gives a factor other segments."""
    whole = tuple(Region((Slice(i, 0, size),)) for i, size in enumerate(pieces.factors[factor]))
    if tuple(regions) == whole:
        return pieces
    rest = [cuts for i, cuts in enumerate(pieces.factors) if i != factor]
    blocks = {}
    for other in indices(rest):
        for segment, region in enumerate(regions):
            parts = []
            for piece in region.slices:
                block = pieces.blocks[(*other[:factor], piece.segment, *other[factor:])]
                part = cut(grid, block, factor, piece)
                parts.append(
                    spread(grid, part, factor) if region.spread or len(region.slices) > 1 else part
                )
            blocks[(*other[:factor], segment, *other[factor:])] = (
                parts[0] if len(parts) == 1 else join(grid, parts, factor)
            )
    return Pieces(_with_factor(pieces.dims, factor, tuple(r.size for r in regions)), blocks)


def cut(grid: Grid, value: Value, dim: int, piece: Slice) -> Value:
    """A slice along a dimension."""
    if (piece.start, piece.stop, piece.stride) == (0, value.shape[dim], 1):
        return value
    _, start, stop, stride = piece
    return run(
        grid,
        lax.slice_in_dim,
        value,
        start_index=start,
        limit_index=stop,
        stride=stride,
        axis=dim,
    )


def join(grid: Grid, values: Sequence[Value], dim: int) -> Value:
    """Joins values that are not shared along a dimension."""
    values = agree(grid, values, but=dim)
    return run(grid, _concatenate, *values, dim=dim)


@over_phases
def spread(grid: Grid, value: Value, dim: int) -> Value:
    """Cuts a dimension out for every window: it becomes plain, with a position axis."""
    for atom in value.dims[dim]:
        if atom.axis is not None:
            value = _spread_atom(grid, value, dim, atom)
    return value


def agree(grid: Grid, values: Sequence[Value], *, but: int | None = None) -> list[Value]:
    """Spreads dimensions of values that are spread in others of them."""
    values = list(values)
    for dim in range(len(values[0].dims)):
        cut_out = {
            axis
            for value in values
            if not all(a.uniform or a.axis is not None for a in value.dims[dim])
            for axis in value.positions
        }
        for i, value in enumerate(values):
            if dim != but and any(atom.axis in cut_out for atom in value.dims[dim]):
                values[i] = spread(grid, value, dim)
    return values


def run(grid: Grid, function: Callable[..., Array], *values: Value, **options: object) -> Value:
    """A function of one window's arrays, and of options, on values."""
    jaxpr = _jaxpr(function, _avals(values), **options)
    known: dict[Var, Value] = dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Var | Literal) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        (known[eqn.outvars[0]],) = run_rule(grid, eqn, *map(read, eqn.invars))
    return read(jaxpr.outvars[0])


def rebind(grid: Grid, eqn: JaxprEqn, *values: Value, **changed: object) -> list[Value]:
    """An equation on values of other shapes, with some parameters changed."""
    results: list[Value] = run_rule(grid, _equation(eqn, _avals(values), **changed), *values)
    return results


def with_factors(grid: Grid, pieces: Pieces, dims: Sequence[Sequence[int]]) -> Pieces:
    """Splits dimensions into factors of these sizes."""
    if [list(map(sum, dim)) for dim in pieces.dims] == [list(dim) for dim in dims]:
        return pieces
    if len(pieces.blocks) > 1:
        raise Unshared("takes window axes merged with others in two different ways")
    (value,) = pieces.blocks.values()
    sizes = [size for dim in dims for size in dim]
    return Pieces(
        tuple(tuple((size,) for size in dim) for dim in dims),
        {(0,) * len(sizes): over_phases(reshape)(grid, value, sizes)},
    )


def unify(
    grid: Grid, operands: Sequence[Value | Pieces], *, but: int | None = None
) -> list[Pieces]:
    """Gives values of one shape the same segments; `but` is a dimension to leave."""
    values = [in_pieces(value) for value in operands]
    sizes = [common_sizes([p.dims[dim] for p in values]) for dim in range(len(values[0].dims))]
    for i, value in enumerate(values):
        if but is not None:
            one_factor(value, but)
            sizes[but] = [value.shape[but]]
        values[i] = with_factors(grid, value, sizes)
    leave = None if but is None else one_factor(values[0], but)
    for factor in range(len(values[0].factors)):
        if factor == leave:
            continue
        kinds = {kind(p, factor, i) for p in values for i in range(len(p.factors[factor]))}
        if "shared" in kinds:
            values = [cut_constant(grid, p, factor) for p in values]
        regions = _common_regions(values, factor)
        values = [
            select(grid, p, factor, [region[i] for region in regions]) for i, p in enumerate(values)
        ]
    return values


def cut_constant(grid: Grid, pieces: Pieces, factor: int) -> Pieces:
    """Cuts a constant where it starts and ends to be the same everywhere."""
    if len(pieces.blocks) > 1:
        return pieces
    (value,) = pieces.blocks.values()
    array = concrete(value)
    if array is None or kind(pieces, factor, 0) != "plain":
        return pieces
    array = np.moveaxis(array, factor, 0)
    first, last = _longest_uniform_run(array)
    size = len(array)
    if last - first < 2:
        return pieces
    ends = [
        Region((Slice(0, a, b),)) for a, b in ((0, first), (first, last), (last, size)) if a < b
    ]
    cut_up = select(grid, pieces, factor, ends)
    middle = 1 if first else 0
    index = tuple(middle if i == factor else 0 for i in range(len(pieces.factors)))
    blocks = dict(cut_up.blocks)
    blocks[index] = _uniform(blocks[index], factor)
    return cut_up._replace(blocks=blocks)


def common_sizes(dims: Sequence[tuple[Cuts, ...]]) -> list[int]:
    """Sizes of the factors of a dimension that is cut in one value, or merged from others."""
    cut_up = next((dim for dim in dims if any(len(cuts) > 1 for cuts in dim)), None)
    return list(map(sum, cut_up or max(dims, key=len)))


def _common_regions(values: Sequence[Pieces], factor: int) -> list[tuple[Region, ...]]:
    """For every new segment, the region of each value; plain neighbors become one segment."""
    cuts = [p.factors[factor] for p in values]
    kinds = [
        [kind(p, factor, i) for i in range(len(own))] for p, own in zip(values, cuts, strict=True)
    ]
    borders = sorted({0, *(end for own in cuts for end in accumulate(own))})
    runs: list[tuple[int, int, bool]] = []
    for start, stop in pairwise(borders):
        plain = any(
            found[slices_of(own, start, stop)[0].segment] == "plain"
            for found, own in zip(kinds, cuts, strict=True)
        )
        if runs and plain and runs[-1][2]:
            start = runs.pop()[0]
        runs.append((start, stop, plain))
    mixed = any("shared" in found for found in kinds)
    return [
        tuple(Region(slices_of(own, start, stop), plain and mixed) for own in cuts)
        for start, stop, plain in runs
    ]


def _concatenate(*arrays: Array, dim: int) -> Array:
    return lax.concatenate(arrays, dim)


def _avals(values: Sequence[Value]) -> Avals:
    return tuple((value.shape, value.array.dtype) for value in values)


# Many blocks have the same shapes, and strips have those of all positions.
@lru_cache(maxsize=1024)
def _jaxpr(function: Callable[..., Array], avals: Avals, **options: object) -> Jaxpr:
    """A function on operands of these shapes and dtypes."""
    structs = [abstract(*own) for own in avals]
    jaxpr: Jaxpr = jax.make_jaxpr(partial(function, **options))(*structs).jaxpr
    return jaxpr


@lru_cache(maxsize=1024)
def _equation(eqn: JaxprEqn, avals: Avals, **changed: object) -> JaxprEqn:
    """An equation on operands of these shapes and dtypes."""
    structs = [abstract(*own) for own in avals]
    jaxpr: Jaxpr = jax.make_jaxpr(partial(bind, eqn, **changed))(*structs).jaxpr
    (other,) = jaxpr.eqns
    return other


def _spread_atom(grid: Grid, value: Value, dim: int, atom: Atom) -> Value:
    axis = axis_of(atom)
    if axis in value.positions or [a.axis for a in value.atoms].count(axis) > 1:
        raise Unshared("brings a value of a whole window to elements of the window")
    before = [a for d in value.dims[:dim] for a in d]
    inside = value.dims[dim].index(atom)
    place = len(value.positions) + len(before) + inside
    q = step(grid, atom)
    stride, pitch = int(grid.stride[axis] // q), int(atom.pitch // q)
    span = (grid.counts[axis] - 1) * stride + 1
    parts = [
        lax.slice_in_dim(value.array, j * pitch, j * pitch + span, stride, place)
        for j in range(atom.size)
    ]
    positions = tuple(sorted((*value.positions, axis)))
    array = jnp.stack(parts, place + 1)
    array = jnp.moveaxis(array, place, positions.index(axis))
    if atom.size == 1:
        array = lax.squeeze(array, (place + 1,))
    replaced = (Atom(atom.size),) if atom.size > 1 else ()
    dims = list(value.dims)
    dims[dim] = (*dims[dim][:inside], *replaced, *dims[dim][inside + 1 :])
    return Value(array, tuple(dims), positions)


def _with_factor(
    dims: tuple[tuple[Cuts, ...], ...], factor: int, cuts: Cuts
) -> tuple[tuple[Cuts, ...], ...]:
    place = iter(range(sum(map(len, dims))))
    return tuple(tuple(cuts if next(place) == factor else own for own in dim) for dim in dims)


def _longest_uniform_run(array: np.ndarray) -> tuple[int, int]:
    """Start and end of the longest run of equal rows, up to rounding."""
    flat = array.reshape(len(array), -1)
    if np.issubdtype(flat.dtype, np.inexact):
        close = 8 * np.finfo(flat.dtype).eps * np.abs(flat).max(initial=0)
        same = np.isclose(flat[1:], flat[:-1], rtol=0, atol=close, equal_nan=True).all(1)
    else:
        same = (flat[1:] == flat[:-1]).all(1)
    ends = [*(np.flatnonzero(~same) + 1).tolist(), len(array)]
    return max(zip([0, *ends], ends, strict=False), key=lambda run: run[1] - run[0])


def _uniform(value: Value, dim: int) -> Value:
    """A constant that is the same along a dimension, once."""
    first = sum(map(len, value.dims[:dim]))
    array = value.array
    with while_tracing(array):
        for axis in range(first, first + len(value.dims[dim])):
            array = lax.slice_in_dim(array, 0, 1, axis=axis)
    dims = list(value.dims)
    dims[dim] = tuple(atom._replace(uniform=True) for atom in dims[dim])
    return Value(array, tuple(dims))
