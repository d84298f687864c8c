"""Rules for values in pieces that move, add, drop, cut and join dimensions."""

from collections.abc import Callable
from functools import partial
from math import prod

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from fclayers._util.jaxprs import out_shapes
from fclayers.sliding.layout import reshape
from fclayers.sliding.phases import over_phases
from fclayers.sliding.piece_joins import take
from fclayers.sliding.pieces import (
    Cuts,
    Index,
    Pieces,
    block_shape,
    indices,
    is_plain,
    kind,
    map_blocks,
    one_factor,
    places_of,
    starts,
)
from fclayers.sliding.regions import Region, agree, rebind, run, select, slices_of, spread, unify
from fclayers.sliding.values import Atom, Grid, Unshared, Value, while_tracing


def elementwise(grid: Grid, eqn: JaxprEqn, *operands: Pieces) -> Pieces:
    """Block by block; scalars go with every block."""
    shape = out_shapes(eqn)[0]
    shaped = unify(grid, [_stretch_ones(p, shape) for p in operands if p.dims])
    scalars = {i: p.blocks[()] for i, p in enumerate(operands) if not p.dims}
    blocks = {}
    for index in indices(shaped[0].factors):
        members = iter(agree(grid, [p.blocks[index] for p in shaped]))
        values = [scalars[i] if i in scalars else next(members) for i in range(len(operands))]
        (blocks[index],) = rebind(grid, eqn, *values)
    return Pieces(shaped[0].dims, blocks)


def transpose(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    order = eqn.params["permutation"]
    places = places_of(value)
    axes = tuple(axis for dim in order for axis in places[dim])
    blocks = {
        tuple(index[axis] for axis in axes): run(grid, lax.transpose, block, permutation=axes)
        for index, block in value.blocks.items()
    }
    return Pieces(tuple(value.dims[dim] for dim in order), blocks)


def broadcast_in_dim(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims: list[tuple[Cuts, ...]] = [((size,),) for size in shape]
    for dim, place in zip(value.dims, where, strict=True):
        if prod(map(sum, dim)) == shape[place]:
            dims[place] = dim
        elif len(dim) > 1:
            raise Unshared("takes window axes merged with others")
    result = Pieces(tuple(dims), {})
    places = places_of(result)
    axes = [axis for place in where for axis in places[place]]
    blocks = {}
    for index in indices(result.factors):
        own = tuple(index[axis] for axis in axes)
        sizes = block_shape(result.factors, index)
        (blocks[index],) = rebind(
            grid, eqn, value.blocks[own], shape=sizes, broadcast_dimensions=tuple(axes)
        )
    return result._replace(blocks=blocks)


def reshape_rule(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    """For reshape and squeeze. Factors that are cut stay whole, or are split evenly."""
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        raise Unshared("reorders dimensions in a reshape")
    rest = _runs(value)
    dims: list[list[Cuts]] = []
    for size in out_shapes(eqn)[0]:
        dim: list[Cuts] = []
        while size > 1:
            cuts, factor = rest.pop(0)
            whole = sum(cuts)
            if max(whole, size) % min(whole, size):
                raise Unshared("splits window axes unevenly")
            if whole > size:
                inner = whole // size
                if len(cuts) > 1:
                    value = _align_cuts(grid, value, factor, inner)
                    cuts = value.factors[factor]
                rest.insert(0, ((inner,), factor))
                cuts = tuple(n // inner for n in cuts) if len(cuts) > 1 else (size,)
            dim.append(cuts)
            size //= sum(cuts)
        dims.append(dim or [(1,)])
    factors = [cuts for dim in dims for cuts in dim]
    old = [i for i, cuts in enumerate(value.factors) if len(cuts) > 1]
    new = [i for i, cuts in enumerate(factors) if len(cuts) > 1]
    blocks = {}
    for index in indices(factors):
        own = [0] * len(value.factors)
        for i, j in zip(old, new, strict=True):
            own[i] = index[j]
        blocks[index] = over_phases(reshape)(
            grid, value.blocks[tuple(own)], block_shape(factors, index)
        )
    result = Pieces(tuple(map(tuple, dims)), blocks)
    for i, cut_up in enumerate(result.dims):
        if len(cut_up) > 1 and len(cut_up[0]) > 1 and all(len(cuts) == 1 for cuts in cut_up[1:]):
            result = _merge_factors(grid, result, i)
    return result


def slice_rule(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for dim, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        value = take(grid, value, dim, start, limit, stride)
    return value


def rev(grid: Grid, eqn: JaxprEqn, value: Pieces) -> Pieces:
    """Every window gets its own copy of what is reversed."""
    for dim in eqn.params["dimensions"]:
        factor = one_factor(value, dim)
        last = len(value.factors[factor]) - 1
        dims = list(value.dims)
        dims[dim] = (value.factors[factor][::-1],)
        blocks = {}
        for index, block in value.blocks.items():
            place = (*index[:factor], last - index[factor], *index[factor + 1 :])
            own = spread(grid, block, factor)
            blocks[place] = run(grid, lax.rev, own, dimensions=(factor,))
        value = Pieces(tuple(dims), blocks)
    return value


def along(parameter: str) -> Callable[..., list[Pieces]]:
    """The rule for primitives along dimensions that a parameter names, which must not be cut."""

    def rule(grid: Grid, eqn: JaxprEqn, *values: Pieces) -> list[Pieces]:
        fitted = unify(grid, values)
        first, old = fitted[0], fitted[0].dims
        touched = {int(axis) for axis in np.atleast_1d(eqn.params[parameter])}
        for dim in range(len(old)):
            if one_factor(first, dim) != dim or (dim in touched and not is_plain(first, dim)):
                raise Unshared("goes along the window")
        outs = []
        for shape in out_shapes(eqn):
            kept = [i for i in range(len(old)) if len(shape) == len(old) or i not in touched]
            dims = [((n,),) if i in touched else old[i] for i, n in zip(kept, shape, strict=True)]
            outs.append((kept, dims, dict[Index, Value]()))
        for index in first.blocks:
            members = agree(grid, [p.blocks[index] for p in fitted])
            for (kept, _, blocks), result in zip(outs, rebind(grid, eqn, *members), strict=True):
                blocks[tuple(index[i] for i in kept)] = result
        return [Pieces(tuple(dims), blocks) for _, dims, blocks in outs]

    return rule


def gather(grid: Grid, eqn: JaxprEqn, value: Pieces, places: Pieces) -> Pieces:
    """Along dimensions that are not cut."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if len(places.blocks) > 1:
        raise Unshared("picks elements at places inside the window")
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for dim, size in enumerate(value.shape):
        whole = size == sizes[dim] and dim not in (*dropped, *numbers.start_index_map)
        if one_factor(value, dim) != dim or not (whole or is_plain(value, dim)):
            raise Unshared("picks elements of the window")
    kept = [dim for dim in range(len(sizes)) if dim not in dropped]
    dims: list[tuple[Cuts, ...]] = [((size,),) for size in out_shapes(eqn)[0]]
    for place, dim in zip(numbers.offset_dims, kept, strict=True):
        if len(value.factors[dim]) > 1:
            dims[place] = value.dims[dim]
    (where,) = places.blocks.values()
    blocks = {}
    for index, block in value.blocks.items():
        own = tuple(
            n if len(cuts) > 1 else size
            for cuts, n, size in zip(value.factors, block.shape, sizes, strict=True)
        )
        moved = [0] * len(dims)
        for place, dim in zip(numbers.offset_dims, kept, strict=True):
            moved[place] = index[dim]
        (blocks[tuple(moved)],) = rebind(grid, eqn, block, where, slice_sizes=own)
    return Pieces(tuple(dims), blocks)


def _stretch_ones(value: Pieces, shape: tuple[int, ...]) -> Pieces:
    """Makes dimensions of size 1 that go with larger ones uniform."""
    for dim, size in enumerate(shape):
        if value.shape[dim] == 1 < size:
            factor = one_factor(value, dim)
            dims = list(value.dims)
            dims[dim] = ((size,),)
            value = map_blocks(partial(_stretch, dim=factor, size=size), value)
            value = value._replace(dims=tuple(dims))
    return value


def _stretch(value: Value, *, dim: int, size: int) -> Value:
    if value.dims[dim]:
        raise Unshared("brings together values that lie differently in the window")
    place = len(value.phases) + len(value.positions) + sum(map(len, value.dims[:dim]))
    dims = list(value.dims)
    dims[dim] = (Atom(size, uniform=True),)
    with while_tracing(value.array):
        array = jnp.expand_dims(value.array, place)
    return value._replace(array=array, dims=tuple(dims))


def _merge_factors(grid: Grid, value: Pieces, dim: int) -> Pieces:
    """Makes one cut factor of a dimension whose other factors are plain, as repeating makes it."""
    first, *rest = places_of(value)[dim]
    if any(not is_plain(value, factor) for factor in rest):
        return value
    times = prod(value.factors[factor][0] for factor in rest)
    blocks = {}
    for index, block in value.blocks.items():
        shape = (*block.shape[:first], block.shape[first] * times, *block.shape[rest[-1] + 1 :])
        merged = (*index[: first + 1], *index[rest[-1] + 1 :])
        blocks[merged] = over_phases(reshape)(grid, block, shape)
    dims = list(value.dims)
    dims[dim] = (tuple(n * times for n in value.factors[first]),)
    return Pieces(tuple(dims), blocks)


def _runs(value: Pieces) -> list[tuple[Cuts, int]]:
    """Factors that are cut, each with its place, and between them runs of others as one."""
    runs: list[tuple[Cuts, int]] = []
    joined = False
    for factor, cuts in enumerate(value.factors):
        if len(cuts) > 1:
            runs.append((cuts, factor))
        elif joined:
            runs[-1] = ((runs[-1][0][0] * cuts[0],), -1)
        else:
            runs.append((cuts, -1))
        joined = len(cuts) == 1
    return [item for item in runs if sum(item[0]) > 1]


def _align_cuts(grid: Grid, value: Pieces, factor: int, multiple: int) -> Pieces:
    """Moves the ends of shared segments to multiples, inwards."""
    cuts, regions, done = value.factors[factor], [], 0
    for segment, (first, size) in enumerate(zip(starts(cuts), cuts, strict=True)):
        start = -(-first // multiple) * multiple
        stop = (first + size) // multiple * multiple
        if start < stop and kind(value, factor, segment) != "plain":
            if done < start:
                regions.append(Region(slices_of(cuts, done, start), True))
            regions.append(Region(slices_of(cuts, start, stop)))
            done = stop
    if done < sum(cuts):
        regions.append(Region(slices_of(cuts, done, sum(cuts)), True))
    return select(grid, value, factor, regions)
