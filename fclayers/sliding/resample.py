"""Rules for resizing: a constant matrix along a window axis whose columns repeat, shifted.

`jax.image.resize` multiplies by such a matrix or picks elements at constant places. In the middle
of the window, `u` outputs are made of the elements around, the next `u` of those `v` elements
further: they are sums of strided slices. The outputs near the ends are segments of their own.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from typing import NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.jaxprs import aval
from fclayers.sliding.piece_joins import concatenate_pieces, stack_and_merge, take
from fclayers.sliding.pieces import (
    Pieces,
    as_value,
    concrete,
    in_pieces,
    one_factor,
    varies_inside,
)
from fclayers.sliding.regions import run, unify
from fclayers.sliding.values import Grid, Unshared, Value

# Longer sums are products of matrices.
_MAX_TAPS = 8


class Taps(NamedTuple):
    """The elements that an output is a sum of, and their weights; none where it is one element."""

    places: tuple[int, ...]
    weights: np.ndarray | None


class Repeating(NamedTuple):
    """Outputs `start` to `stop` repeat: `period` of them, then the same `shift` further on."""

    start: int
    stop: int
    period: int
    shift: int


def repeats(eqn: JaxprEqn, values: Sequence[Value | Pieces]) -> bool:
    """Whether an equation is a product with a matrix that is better resampled."""
    if eqn.primitive.name != "dot_general":
        return False
    found = _matrix_of(eqn, values)
    return found is not None and _columns(found[1]) is not None


def product(grid: Grid, eqn: JaxprEqn, lhs: Pieces, rhs: Pieces) -> Pieces:
    """The rule for a product with a matrix whose columns repeat."""
    found = _matrix_of(eqn, (lhs, rhs))
    columns = found and _columns(found[1])
    if not found or not columns:
        raise Unshared("multiplies by a matrix that does not repeat")
    side, _, dim = found
    value = _resample(grid, (lhs, rhs)[side], dim, columns, aval(eqn.outvars[0]).dtype)
    last = len(value.dims) - 1
    return _move_dim(grid, value, dim, last if side == 0 else 0)


def pick(grid: Grid, eqn: JaxprEqn, value: Pieces, indices: Pieces) -> Pieces:
    """The rule for picking elements along one window axis at constant places."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    places = _constant(indices)
    if (
        places is None
        or places.ndim != 2
        or len(numbers.start_index_map) != 1
        or numbers.collapsed_slice_dims != numbers.start_index_map
        or numbers.operand_batching_dims
    ):
        raise Unshared("picks elements of the window")
    (dim,) = numbers.start_index_map
    rest = [i for i in range(len(sizes)) if i != dim]
    size, chosen = value.shape[dim], places[:, 0]
    if (
        any(sizes[i] != value.shape[i] for i in rest)
        or not 0 <= chosen.min() <= chosen.max() < size
    ):
        raise Unshared("picks elements of the window")
    columns = [Taps((int(place),), None) for place in chosen]
    result = _resample(grid, value, dim, columns, aval(eqn.outvars[0]).dtype)
    (where,) = set(range(len(result.dims))) - set(numbers.offset_dims)
    return _move_dim(grid, result, dim, where)


def _matrix_of(
    eqn: JaxprEqn, values: Sequence[Value | Pieces]
) -> tuple[int, np.ndarray, int] | None:
    """The side of the value, the other as (elements, outputs), and the value's dimension."""
    (lhs_sum, rhs_sum), (batch, _) = eqn.params["dimension_numbers"]
    if batch or len(lhs_sum) != 1:
        return None
    for side, dim, other in ((0, lhs_sum[0], rhs_sum[0]), (1, rhs_sum[0], lhs_sum[0])):
        matrix = _constant(values[1 - side])
        if matrix is not None and matrix.ndim == 2 and varies_inside(values[side]):
            return side, np.moveaxis(matrix, other, 0), dim
    return None


def _constant(value: Value | Pieces) -> np.ndarray | None:
    block = as_value(in_pieces(value))
    return concrete(block) if isinstance(block, Value) else None


def _columns(matrix: np.ndarray) -> list[Taps] | None:
    """What every output is made of, if that is little and repeats."""
    if not np.issubdtype(matrix.dtype, np.floating):
        return None
    columns = []
    for column in matrix.T:
        places = np.flatnonzero(column)
        if not 0 < len(places) <= _MAX_TAPS or np.ptp(places) >= _MAX_TAPS:
            return None
        run_of = np.arange(places[0], places[-1] + 1)
        columns.append(Taps(tuple(map(int, run_of)), column[run_of]))
    return columns if _find_repeating(columns, len(matrix)) else None


def _find_repeating(columns: Sequence[Taps], size: int) -> Repeating | None:
    """The longest run of outputs that repeats, if it is more than a few."""
    ratio = Fraction(len(columns), size)
    period, shift = ratio.numerator, ratio.denominator
    alike = [_is_shifted(*pair, shift) for pair in zip(columns, columns[period:], strict=False)]
    ends = [*(i for i, same in enumerate(alike) if not same), len(alike)]
    starts = [0, *(end + 1 for end in ends)]
    start, end = max(zip(starts, ends, strict=False), key=lambda run: run[1] - run[0])
    stop = start + (end - start) // period * period + period
    return Repeating(start, stop, period, shift) if stop - start >= 2 * period else None


def _is_shifted(taps: Taps, other: Taps, shift: int) -> bool:
    if tuple(place + shift for place in taps.places) != other.places:
        return False
    if taps.weights is None or other.weights is None:
        return True
    close = 8 * np.finfo(taps.weights.dtype).eps * np.abs(taps.weights).max()
    return bool(np.abs(taps.weights - other.weights).max() <= close)


def _resample(
    grid: Grid, value: Pieces, dim: int, columns: Sequence[Taps], dtype: np.dtype
) -> Pieces:
    repeating = _find_repeating(columns, value.shape[dim])
    if repeating is None:
        raise Unshared("picks elements of the window")
    start, stop, period, shift = repeating
    times = (stop - start) // period
    first = columns[start : start + period]
    parts = [_sum_of_slices(grid, value, dim, taps, times, shift, dtype) for taps in first]
    middle = stack_and_merge(grid, parts, dim)
    ends = [
        [_sum_of_slices(grid, value, dim, taps, 1, 1, dtype) for taps in part]
        for part in (columns[:start], columns[stop:])
    ]
    return concatenate_pieces(grid, [*ends[0], middle, *ends[1]], dim)


def _sum_of_slices(
    grid: Grid, value: Pieces, dim: int, taps: Taps, count: int, shift: int, dtype: np.dtype
) -> Pieces:
    slices = [
        take(grid, value, dim, place, place + (count - 1) * shift + 1, shift)
        for place in taps.places
    ]
    weights = taps.weights
    if weights is None:
        return slices[0]
    fitted = unify(grid, slices)

    blocks = {
        index: run(
            grid,
            _weighted_sum,
            *(value.blocks[index] for value in fitted),
            weights=tuple(weights),
            dtype=dtype,
        )
        for index in fitted[0].blocks
    }
    return fitted[0]._replace(blocks=blocks)


def _weighted_sum(*arrays: Array, weights: Sequence[np.generic], dtype: np.dtype) -> Array:
    terms = [array.astype(dtype) * dtype.type(w) for array, w in zip(arrays, weights, strict=True)]
    total: Array = reduce(lax.add, terms)
    return total


def _move_dim(grid: Grid, value: Pieces, dim: int, place: int) -> Pieces:
    if dim == place:
        return value
    for i in range(len(value.dims)):
        one_factor(value, i)
    order = [i for i in range(len(value.dims)) if i != dim]
    order.insert(place, dim)
    blocks = {
        tuple(index[i] for i in order): run(grid, lax.transpose, block, permutation=tuple(order))
        for index, block in value.blocks.items()
    }
    return Pieces(tuple(value.dims[i] for i in order), blocks)
