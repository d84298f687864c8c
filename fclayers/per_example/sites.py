"""Sites: where a parameter meets data in a product, and the two factors of its gradient there.

At every position, the gradient is the outer product of a row (what the parameter is multiplied by)
and a column (the cotangent of the result). A rule finds them for one primitive.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.jaxprs import aval

Axes = tuple[int, ...]


class Rule(NamedTuple):
    """The factors of a parameter's gradient at an equation.

    Attributes:
        axes: The parameter's axes of the blocks, the rows and the columns.
        blocks: Number of blocks, `B`: of batch axes that data and parameter share, or of groups.
        positions: Number of positions, `P`, at which each block is used.
        rows: The rows `(B, P, in)` from the equation's other operands, or integers `(B, P)`: where
            they are one, all other entries being zero.
        columns: The columns `(B, P, out)` from the cotangent and the other operands.
        restore: Lays out a gradient `(B, in, out)` as the parameter.
        sizes: `in` and `out`.
        sparse: Whether rows are integers.
        grouped: Whether blocks are parts of an axis.
    """

    axes: tuple[Axes, Axes, Axes]
    blocks: int
    positions: int
    rows: Callable[[Sequence[Array]], Array]
    columns: Callable[[Array, Sequence[Array]], Array]
    restore: Callable[[Array], Array]
    sizes: tuple[int, int]
    sparse: bool = False
    grouped: bool = False


def find_rule(eqn: JaxprEqn, operand: int, order: Axes) -> Rule | None:
    """The rule for an equation in one operand; rows and columns are sorted by `order`."""
    rule = _RULES.get(eqn.primitive.name)
    return rule(eqn, operand, order) if rule else None


def wide(array: Array) -> Array:
    """Half precision in float32."""
    return array.astype(accumulation_dtype(array.dtype) or array.dtype)


def _dot_general(eqn: JaxprEqn, operand: int, order: Axes) -> Rule | None:
    contract, batch = eqn.params["dimension_numbers"]
    ours, theirs = aval(eqn.invars[operand]).shape, aval(eqn.invars[1 - operand]).shape
    pairs = sorted(
        zip(contract[operand], contract[1 - operand], strict=True), key=lambda pair: order[pair[0]]
    )
    ins, their_ins = tuple(a for a, _ in pairs), tuple(a for _, a in pairs)
    blocks, their_blocks = tuple(batch[operand]), tuple(batch[1 - operand])
    free = tuple(a for a in range(len(ours)) if a not in ins + blocks)
    outs = tuple(sorted(free, key=order.__getitem__))
    their_free = tuple(a for a in range(len(theirs)) if a not in their_ins + their_blocks)
    num_blocks, num_in, num_out = (prod(ours[a] for a in axes) for axes in (blocks, ins, outs))
    positions = prod(theirs[a] for a in their_free)

    def rows(others: Sequence[Array]) -> Array:
        (x,) = others
        x = wide(x).transpose(*their_blocks, *their_free, *their_ins)
        return x.reshape(num_blocks, positions, num_in)

    def columns(cotangent: Array, others: Sequence[Array]) -> Array:
        split = (num_blocks, positions, *(ours[a] for a in free))
        if operand == 0:
            split = (num_blocks, *split[2:], positions)
        g = wide(cotangent).reshape(split)
        g = jnp.moveaxis(g, -1, 1) if operand == 0 else g
        g = g.transpose(0, 1, *(2 + free.index(a) for a in outs))
        return g.reshape(num_blocks, positions, num_out)

    return Rule(
        (blocks, ins, outs),
        num_blocks,
        positions,
        rows,
        columns,
        _restore(ours, (*blocks, *ins, *outs)),
        (num_in, num_out),
    )


def _conv(eqn: JaxprEqn, operand: int, order: Axes) -> Rule | None:
    params = eqn.params
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    shape, out_shape = aval(eqn.invars[1]).shape, aval(eqn.outvars[0]).shape
    out_axis, in_axis, *spatial = numbers.rhs_spec
    ins = tuple(sorted((in_axis, *spatial), key=order.__getitem__))
    counts = tuple(out_shape[a] for a in numbers.out_spec[2:])
    images, num_out = out_shape[numbers.out_spec[0]], shape[out_axis] // groups
    num_in, positions = prod(shape[a] for a in ins), images * prod(counts)
    kernel = [shape[a] for a in spatial]

    def rows(others: Sequence[Array]) -> Array:
        (x,) = others
        batch_axis, feature_axis, *theirs = numbers.lhs_spec
        x = wide(x).transpose(batch_axis, *theirs, feature_axis)
        edges = [(0, 0, 0)] * x.ndim
        for i, ((low, high), dilation) in enumerate(
            zip(params["padding"], params["lhs_dilation"], strict=True)
        ):
            edges[1 + i] = (low, high, dilation - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), edges)
        strides = params["window_strides"]
        taps = []
        for tap in product(*map(range, kernel)):
            starts = [t * d for t, d in zip(tap, params["rhs_dilation"], strict=True)]
            spans = zip(starts, counts, strides, strict=True)
            stops = [start + (count - 1) * stride + 1 for start, count, stride in spans]
            limits = (images, *stops, x.shape[-1])
            taps.append(lax.slice(x, (0, *starts, 0), limits, (1, *strides, 1)))
        patches = jnp.stack(taps, axis=-2).reshape(positions, *kernel, groups, shape[in_axis])
        ndim = len(kernel)
        places = {axis: 1 + i for i, axis in enumerate(spatial)} | {in_axis: 2 + ndim}
        patches = patches.transpose(1 + ndim, 0, *(places[a] for a in ins))
        return patches.reshape(groups, positions, num_in)

    def columns(cotangent: Array, others: Sequence[Array]) -> Array:
        batch_axis, feature_axis, *theirs = numbers.out_spec
        g = wide(cotangent).transpose(batch_axis, *theirs, feature_axis)
        return g.reshape(positions, groups, num_out).swapaxes(0, 1)

    in_ndim = len(ins)

    def restore(g: Array) -> Array:
        g = g.reshape(groups, *(shape[a] for a in ins), num_out)
        g = jnp.moveaxis(g, 0, in_ndim).reshape(*(shape[a] for a in ins), groups * num_out)
        return g.transpose([(*ins, out_axis).index(a) for a in range(len(shape))])

    return Rule(
        ((), ins, (out_axis,)),
        groups,
        positions,
        rows,
        columns,
        restore,
        (num_in, num_out),
        grouped=groups > 1,
    )


def _gather(eqn: JaxprEqn, operand: int, order: Axes) -> Rule | None:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    shape, out_shape = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
    ins, sizes = tuple(numbers.start_index_map), params["slice_sizes"]
    free = tuple(a for a in range(len(shape)) if a not in ins)
    modes = lax.GatherScatterMode
    known = (modes.FILL_OR_DROP, modes.CLIP, modes.PROMISE_IN_BOUNDS)
    picks_rows = (
        operand == 0
        and not numbers.operand_batching_dims
        and set(ins) == set(numbers.collapsed_slice_dims)
        and all(sizes[a] == shape[a] for a in free)
        and params["mode"] in known
    )
    if not picks_rows:
        return None
    offsets = tuple(numbers.offset_dims)
    batch = tuple(a for a in range(len(out_shape)) if a not in offsets)
    positions = prod(out_shape[a] for a in batch)
    limits = [shape[a] for a in ins]

    def columns(cotangent: Array, others: Sequence[Array]) -> Array:
        outs = tuple(offsets[free.index(a)] for a in sorted(free, key=order.__getitem__))
        g = wide(cotangent).transpose(*batch, *outs).reshape(1, positions, -1)
        if params["mode"] != modes.FILL_OR_DROP:
            return g
        places = others[0].reshape(positions, len(ins))
        inside = (places >= 0) & (places < jnp.asarray(limits, places.dtype))
        return jnp.where(inside.all(-1)[:, None], g, 0)

    def rows(others: Sequence[Array]) -> Array:
        places = others[0].reshape(positions, len(ins))
        return _flat(list(places.T), limits, ins, order).reshape(1, positions)

    return _sparse(shape, ins, free, positions, rows, columns, order)


def _dynamic_slice(eqn: JaxprEqn, operand: int, order: Axes) -> Rule | None:
    shape, sizes = aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
    free = tuple(a for a in range(len(shape)) if sizes[a] == shape[a])
    ins = tuple(a for a in range(len(shape)) if a not in free)
    if operand or not ins or any(sizes[a] != 1 for a in ins):
        return None

    def rows(others: Sequence[Array]) -> Array:
        starts = [others[a] for a in ins]
        return _flat(starts, [shape[a] for a in ins], ins, order).reshape(1, 1)

    def columns(cotangent: Array, others: Sequence[Array]) -> Array:
        outs = sorted(free, key=order.__getitem__)
        return wide(cotangent).transpose(*ins, *outs).reshape(1, 1, -1)

    return _sparse(shape, ins, free, 1, rows, columns, order)


def _sparse(
    shape: Axes,
    ins: Axes,
    free: Axes,
    positions: int,
    rows: Callable[[Sequence[Array]], Array],
    columns: Callable[[Array, Sequence[Array]], Array],
    order: Axes,
) -> Rule:
    ins = tuple(sorted(ins, key=order.__getitem__))
    outs = tuple(sorted(free, key=order.__getitem__))
    sizes = prod(shape[a] for a in ins), prod(shape[a] for a in outs)
    restore = _restore(shape, ins + outs)
    return Rule(((), ins, outs), 1, positions, rows, columns, restore, sizes, sparse=True)


def _flat(places: Sequence[Array], limits: Sequence[int], ins: Axes, order: Axes) -> Array:
    """One integer for a place along several axes, clamped as JAX does."""
    flat: Array = jnp.zeros((), jnp.int32)
    for i in sorted(range(len(ins)), key=lambda i: order[ins[i]]):
        inside = jnp.clip(places[i], 0, limits[i] - 1).astype(jnp.int32)
        flat = flat * limits[i] + inside
    return flat


def _restore(shape: Axes, axes: Axes) -> Callable[[Array], Array]:
    """Lays out an array whose flattened axes are these of the parameter."""

    def restore(g: Array) -> Array:
        return g.reshape([shape[a] for a in axes]).transpose(
            [axes.index(a) for a in range(len(shape))]
        )

    return restore


_RULES: dict[str, Callable[[JaxprEqn, int, Axes], Rule | None]] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}
