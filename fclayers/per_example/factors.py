"""The factors of one example's gradient at a site, their inner products, and their product.

Loops in which the parameter stays the same are more positions; others are more blocks.
"""

from collections.abc import Callable
from itertools import compress
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fclayers.per_example.capture import Captured
from fclayers.per_example.program import Program, Site
from fclayers.per_example.views import View, are_disjoint, is_same


class Factors(NamedTuple):
    """A gradient as a sum of outer products over positions.

    Attributes:
        rows: `(B, P, in)`, or for sparse rows integers `(B, P)`.
        columns: `(outs, B, P, out)`.
    """

    rows: Array
    columns: Array


class Sizes(NamedTuple):
    """Blocks, positions, inputs and outputs of a site, with all loops."""

    blocks: int
    positions: int
    inputs: int
    outputs: int


def sizes_of(site: Site) -> Sizes:
    """The sizes of a site's factors."""
    blocks = prod(stack_of(site))
    positions = prod(site.lengths) // blocks
    return Sizes(blocks * site.rule.blocks, positions * site.rule.positions, *site.rule.sizes)


def stack_of(site: Site) -> list[int]:
    """The lengths of the loops in which the value is another one every time."""
    return list(compress(site.lengths, site.stacked))


def factors_of(site: Site, example: Captured) -> Factors:
    """The factors of one example, cut out of what was captured."""
    rule, sizes = site.rule, sizes_of(site)
    inputs, cotangents = example.inputs[site.number], example.cotangents[site.number]
    rows, columns = rule.rows, rule.columns
    for _ in site.lengths:
        rows, columns = jax.vmap(rows), jax.vmap(columns)

    def merged(array: Array) -> Array:
        depth = len(site.lengths)
        blocks = [i for i in range(depth) if site.stacked[i]]
        positions = [i for i in range(depth) if not site.stacked[i]]
        order = (*blocks, depth, *positions, *range(depth + 1, array.ndim))
        return array.transpose(order).reshape(
            sizes.blocks, sizes.positions, *array.shape[depth + 2 :]
        )

    by_result: Callable[[Array], Array] = jax.vmap(lambda c: merged(columns(c, inputs)))
    return Factors(merged(rows(inputs)), by_result(cotangents))


def product_of(site: Site, factors: Factors) -> Array:
    """The gradients `(outs, *shape)` of the known value at a site."""
    rows, columns = factors
    if site.rule.sparse:
        empty = jnp.zeros((site.rule.sizes[0], columns.shape[-1]), columns.dtype)

        def put(rows: Array, columns: Array) -> Array:
            return empty.at[rows].add(columns)

        products = jax.vmap(jax.vmap(put), in_axes=(None, 0))(rows, columns)
    else:
        products = jnp.einsum("bpi,rbpo->rbio", rows, columns)
    stack = stack_of(site)
    split = products.reshape(columns.shape[0], *stack, site.rule.blocks, *products.shape[2:])
    restore = site.rule.restore
    for _ in range(1 + len(stack)):
        restore = jax.vmap(restore)
    return restore(split)


class Pair(NamedTuple):
    """Two sites of one parameter, as what they are to each other."""

    one: int
    other: int
    factor: float
    swapped: bool


def pair_up(program: Program, sites: list[Site]) -> list[Pair] | None:
    """The pairs of sites whose gradients have an inner product that follows from the factors.

    Sites of different elements of a parameter form none. `None` if a pair needs the gradients
    themselves.
    """
    views = [program.views[site.name] for site in sites]
    axes = [_axes(site, view) for site, view in zip(sites, views, strict=True)]
    pairs = []
    for i in range(len(sites)):
        for j in range(i + 1):
            if are_disjoint(views[i], views[j]):
                continue
            kinds = [sites[k].rule.grouped for k in (i, j)]
            if not is_same(views[i], views[j]) or kinds[0] != kinds[1]:
                return None
            if sites[i].rule.blocks != sites[j].rule.blocks:
                return None
            blocks, rows, columns = axes[j]
            swapped = axes[i] != axes[j]
            if swapped and (kinds[0] or axes[i] != (blocks, columns, rows)):
                return None
            pairs.append(Pair(i, j, views[i].scale * views[j].scale, swapped))
    return pairs


def _axes(site: Site, view: View) -> tuple[tuple[int, ...], ...]:
    """The parameter's axes of blocks, rows and columns."""
    stacked = sum(site.stacked)
    blocks, rows, columns = (
        tuple(view.order[stacked + axis] for axis in axes) for axes in site.rule.axes
    )
    return (view.order[:stacked] + blocks, rows, columns)


def inner(sites: list[Site], pair: Pair, one: Factors, other: Factors) -> Array:
    """The inner products `(outs, other outs)` of two gradients of one parameter."""
    a, b = sites[pair.one], sites[pair.other]
    if not pair.swapped:
        rows = _rows_by_rows(a, b, one.rows, other.rows)
        columns = jnp.einsum("rbpo,sbqo->rsbpq", one.columns, other.columns)
        return jnp.einsum("bpq,rsbpq->rs", rows, columns)
    mixed = _rows_by_columns(a, one.rows, other.columns)
    mixed_back = _rows_by_columns(b, other.rows, one.columns)
    return jnp.einsum("sbpq,rbqp->rs", mixed, mixed_back)


def _rows_by_rows(a: Site, b: Site, one: Array, other: Array) -> Array:
    if a.rule.sparse and b.rule.sparse:
        hits: Array = one[:, :, None] == other[:, None, :]
        return hits.astype(jnp.float32)
    if a.rule.sparse:
        return _pick(one, other).swapaxes(1, 2)
    if b.rule.sparse:
        return _pick(other, one)
    return jnp.einsum("bpi,bqi->bpq", one, other)


def _rows_by_columns(site: Site, rows: Array, columns: Array) -> Array:
    """`(outs, B, P, Q)`: positions of the rows, then of the columns."""
    if site.rule.sparse:
        return jax.vmap(lambda c: _pick(rows, c).swapaxes(1, 2))(columns)
    return jnp.einsum("bpi,rbqi->rbpq", rows, columns)


def _pick(places: Array, vectors: Array) -> Array:
    """`(B, Q, P)`: the entries of vectors `(B, Q, n)` at the places `(B, P)`."""
    picked: Array = jax.vmap(lambda place, vector: vector[:, place])(places, vectors)
    return picked
