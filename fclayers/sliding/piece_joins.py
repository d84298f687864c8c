"""Rules for values in pieces that pad, join and cut dimensions: they make segments."""

from collections.abc import Sequence

from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers.sliding.pieces import Pieces, in_pieces, is_plain, map_blocks, one_factor
from fclayers.sliding.regions import Region, agree, join, rebind, run, select, slices_of, unify
from fclayers.sliding.values import Grid, Unshared


def pad(grid: Grid, eqn: JaxprEqn, value: Pieces, fill: Pieces) -> Pieces:
    """What is added is a segment of its own; what lies between elements repeats with them."""
    config = eqn.params["padding_config"]
    inside = [
        pads if any(pads) and is_plain(value, one_factor(value, dim)) else (0, 0, 0)
        for dim, pads in enumerate(config)
    ]
    if any(map(any, inside)):
        value = _pad_blocks(grid, eqn, value, fill, inside)
        config = [(0, 0, 0) if any(own) else pads for pads, own in zip(config, inside, strict=True)]
    for dim, (low, high, interior) in enumerate(config):
        if interior and value.shape[dim] > 1:
            value = _pad_between(grid, value, fill, dim, interior)
        value = take(grid, value, dim, max(-low, 0), value.shape[dim] - max(-high, 0))
        ends = [_filled(grid, value, fill, dim, size) for size in (max(low, 0), max(high, 0))]
        parts = [part for part in (ends[0], value, ends[1]) if part]
        value = concatenate_pieces(grid, parts, dim)
    return value


def concatenate(grid: Grid, eqn: JaxprEqn, *values: Pieces) -> Pieces:
    dim = eqn.params["dimension"]
    return concatenate_pieces(grid, [value for value in values if value.shape[dim]], dim)


def split(grid: Grid, eqn: JaxprEqn, value: Pieces) -> list[Pieces]:
    axis, start, parts = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        parts.append(take(grid, value, axis, start, start + size))
        start += size
    return parts


def concatenate_pieces(grid: Grid, values: Sequence[Pieces], dim: int) -> Pieces:
    if len(values) == 1:
        return values[0]
    fitted = unify(grid, values, but=dim)
    factor = one_factor(fitted[0], dim)
    dims, blocks = list(fitted[0].dims), {}
    if all(is_plain(value, factor) for value in fitted):
        for index in fitted[0].blocks:
            blocks[index] = join(grid, [value.blocks[index] for value in fitted], factor)
        dims[dim] = ((sum(value.shape[dim] for value in fitted),),)
        return Pieces(tuple(dims), blocks)
    offset = 0
    for value in fitted:
        for index, block in value.blocks.items():
            blocks[(*index[:factor], index[factor] + offset, *index[factor + 1 :])] = block
        offset += len(value.factors[factor])
    dims[dim] = (tuple(n for value in fitted for n in value.factors[factor]),)
    return Pieces(tuple(dims), blocks)


def stack_and_merge(grid: Grid, values: Sequence[Pieces], dim: int) -> Pieces:
    """Interleaves values along a dimension."""
    fitted = unify(grid, values)
    factor, count = one_factor(fitted[0], dim), len(fitted)
    if count == 1:
        return fitted[0]
    blocks = {
        index: run(grid, _interleave, *agree(grid, [p.blocks[index] for p in fitted]), dim=factor)
        for index in fitted[0].blocks
    }
    dims = list(fitted[0].dims)
    dims[dim] = (tuple(n * count for n in fitted[0].factors[factor]),)
    return Pieces(tuple(dims), blocks)


def take(grid: Grid, value: Pieces, dim: int, start: int, limit: int, stride: int = 1) -> Pieces:
    """A slice of a dimension."""
    if (start, limit, stride) == (0, value.shape[dim], 1):
        return value
    factor = one_factor(value, dim)
    slices = slices_of(value.factors[factor], start, limit, stride)
    if not slices:
        raise Unshared("leaves nothing of a dimension")
    return select(grid, value, factor, [Region((piece,)) for piece in slices])


def _pad_blocks(
    grid: Grid, eqn: JaxprEqn, value: Pieces, fill: Pieces, config: Sequence[tuple[int, int, int]]
) -> Pieces:
    """Pads dimensions that are not cut."""
    by_factor = [(0, 0, 0)] * len(value.factors)
    dims = list(value.dims)
    for dim, (low, high, interior) in enumerate(config):
        if any((low, high, interior)):
            size = value.shape[dim]
            by_factor[one_factor(value, dim)] = (low, high, interior)
            dims[dim] = ((low + size + max(size - 1, 0) * interior + high,),)
    own = fill.blocks[()]
    padded = map_blocks(
        lambda block: rebind(grid, eqn, block, own, padding_config=tuple(by_factor))[0], value
    )
    return padded._replace(dims=tuple(dims))


def _pad_between(grid: Grid, value: Pieces, fill: Pieces, dim: int, count: int) -> Pieces:
    """Puts `count` elements behind each, and drops the last ones."""
    factor, between = one_factor(value, dim), fill.blocks[()]
    dims = list(value.dims)
    dims[dim] = (tuple(n * (count + 1) for n in value.factors[factor]),)
    wide = map_blocks(
        lambda block: run(grid, _widen, block, between, dim=factor, count=count), value
    )
    wide = wide._replace(dims=tuple(dims))
    return take(grid, wide, dim, 0, wide.shape[dim] - count)


def _widen(x: Array, between: Array, *, dim: int, count: int) -> Array:
    """Puts `count` elements behind each along a dimension."""
    shape = (*x.shape[: dim + 1], count, *x.shape[dim + 1 :])
    pairs = [lax.expand_dims(x, (dim + 1,)), lax.broadcast(between, shape)]
    return _merge_into(lax.concatenate(pairs, dim + 1), dim)


def _interleave(*arrays: Array, dim: int) -> Array:
    return _merge_into(
        lax.concatenate([lax.expand_dims(x, (dim + 1,)) for x in arrays], dim + 1), dim
    )


def _merge_into(x: Array, dim: int) -> Array:
    """Merges a dimension and the next one."""
    merged = x.shape[dim] * x.shape[dim + 1]
    return lax.reshape(x, (*x.shape[:dim], merged, *x.shape[dim + 2 :]))


def _filled(grid: Grid, value: Pieces, fill: Pieces, dim: int, size: int) -> Pieces | None:
    if not size:
        return None
    shape = tuple(size if i == dim else n for i, n in enumerate(value.shape))
    return in_pieces(run(grid, lax.broadcast, fill.blocks[()], sizes=shape))
