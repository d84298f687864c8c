"""Rules for products and reductions of values in pieces: sums over the pieces."""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, pairwise

from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers.sliding.pieces import Index, Pieces, places_of
from fclayers.sliding.regions import (
    Region,
    common_sizes,
    rebind,
    run,
    select,
    slices_of,
    with_factors,
)
from fclayers.sliding.values import Grid, Value

_COMBINE: dict[str, Callable[..., Array]] = {
    "reduce_and": lax.bitwise_and,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_or": lax.bitwise_or,
    "reduce_prod": lax.mul,
    "reduce_sum": lax.add,
}


def reduction(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    axes = eqn.params["axes"]
    places = places_of(value)
    gone = tuple(factor for axis in axes for factor in places[axis])
    parts: dict[Index, list[Value]] = {}
    for index, block in value.blocks.items():
        kept = tuple(i for factor, i in enumerate(index) if factor not in gone)
        (part,) = rebind(grid, eqn, block, axes=gone)
        parts.setdefault(kept, []).append(part)
    combine = _COMBINE[eqn.primitive.name]
    blocks = {
        index: reduce(lambda a, b: run(grid, combine, a, b), members)
        for index, members in parts.items()
    }
    return Pieces(tuple(dim for i, dim in enumerate(value.dims) if i not in axes), blocks)


def dot_general(grid: Grid, eqn: JaxprEqn, lhs: Pieces, rhs: Pieces) -> Pieces:
    contracted, batch = eqn.params["dimension_numbers"]
    for i, j in zip(*contracted, strict=True):
        lhs, rhs = _match(grid, lhs, i, rhs, j)
    for i, j in zip(*batch, strict=True):
        lhs, rhs = _match(grid, lhs, i, rhs, j)
    sides = [_by_role(p, c, b) for p, c, b in zip((lhs, rhs), contracted, batch, strict=True)]
    (lhs_sum, lhs_batch, lhs_free), (rhs_sum, rhs_batch, rhs_free) = sides
    numbers = ((lhs_sum, rhs_sum), (lhs_batch, rhs_batch))
    blocks: dict[Index, Value] = {}
    for left, a in lhs.blocks.items():
        for right, b in rhs.blocks.items():
            if any(left[i] != right[j] for i, j in zip(lhs_sum, rhs_sum, strict=True)):
                continue
            if any(left[i] != right[j] for i, j in zip(lhs_batch, rhs_batch, strict=True)):
                continue
            index = (
                *(left[i] for i in lhs_batch),
                *(left[i] for i in lhs_free),
                *(right[j] for j in rhs_free),
            )
            (part,) = rebind(grid, eqn, a, b, dimension_numbers=numbers)
            blocks[index] = run(grid, lax.add, blocks[index], part) if index in blocks else part
    dims = [lhs.dims[i] for i in batch[0]]
    dims += [d for i, d in enumerate(lhs.dims) if i not in (*contracted[0], *batch[0])]
    dims += [d for j, d in enumerate(rhs.dims) if j not in (*contracted[1], *batch[1])]
    return Pieces(tuple(dims), blocks)


def _match(grid: Grid, lhs: Pieces, i: int, rhs: Pieces, j: int) -> tuple[Pieces, Pieces]:
    """Gives dimensions that are multiplied the same segments."""
    sizes = common_sizes([lhs.dims[i], rhs.dims[j]])
    lhs, rhs = _with_dim(grid, lhs, i, sizes), _with_dim(grid, rhs, j, sizes)
    for left, right in zip(places_of(lhs)[i], places_of(rhs)[j], strict=True):
        own, other = lhs.factors[left], rhs.factors[right]
        borders = list(pairwise(sorted({0, *accumulate(own), *accumulate(other)})))
        lhs = select(grid, lhs, left, [Region(slices_of(own, *ends)) for ends in borders])
        rhs = select(grid, rhs, right, [Region(slices_of(other, *ends)) for ends in borders])
    return lhs, rhs


def _with_dim(grid: Grid, value: Pieces, dim: int, sizes: Sequence[int]) -> Pieces:
    own = [list(map(sum, factors)) for factors in value.dims]
    return with_factors(grid, value, [*own[:dim], list(sizes), *own[dim + 1 :]])


def _by_role(
    value: Pieces, contracted: Sequence[int], batch: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The factors that are contracted, those of the batch, and the others."""
    places = places_of(value)
    gone, held = (tuple(f for dim in dims for f in places[dim]) for dims in (contracted, batch))
    free = tuple(f for f in range(len(value.factors)) if f not in (*gone, *held))
    return gone, held, free
