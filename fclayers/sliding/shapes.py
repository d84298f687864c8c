"""Rules for primitives that move, add, drop, cut and join dimensions, and that go along one."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.jaxprs import bind, bind_one, out_shapes
from fclayers.sliding.layout import align, align_per_dim, position_single_elements, reshape
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    dense,
    make_value,
    over_positions,
    per_dim,
    step,
    window_atom,
)


def reshape_rule(grid: Grid, eqn: JaxprEqn, value: Value) -> Value:
    """For reshape and squeeze."""
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        value = _permute(value, eqn.params["dimensions"])
    return reshape(grid, value, out_shapes(eqn)[0])


def transpose(grid: Grid, eqn: JaxprEqn, value: Value) -> Value:
    return _permute(value, eqn.params["permutation"])


def _permute(value: Value, order: Sequence[int]) -> Value:
    start = len(value.positions)
    ends = np.cumsum([start, *map(len, value.dims)])
    axes = [axis for dim in order for axis in range(ends[dim], ends[dim + 1])]
    array = value.array.transpose(*range(start), *axes)
    return Value(array, tuple(value.dims[dim] for dim in order), value.positions)


def broadcast_in_dim(grid: Grid, eqn: JaxprEqn, value: Value) -> Value:
    shape = eqn.params["shape"]
    places = eqn.params["broadcast_dimensions"]
    for dim, place in zip(value.dims, places, strict=True):
        if shape[place] != 1:
            axes = [atom.axis for atom in dim if atom.axis is not None and atom.size == 1]
            value = position_single_elements(grid, value, axes)
    dims: list[tuple[Atom, ...]] = [(Atom(n, uniform=True),) if n != 1 else () for n in shape]
    lengths = [[1] * len(dim) for dim in dims]
    own = iter(value.lengths)
    for dim, place in zip(value.dims, places, strict=True):
        if dim:
            dims[place], lengths[place] = dim, [next(own) for _ in dim]
    array = value.array.reshape(*value.leading, *(n for dim in lengths for n in dim))
    return Value(array, tuple(dims), value.positions)


def iota(grid: Grid, eqn: JaxprEqn) -> Value:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    array = lax.iota(eqn.params["dtype"], shape[dimension])
    atoms = [Atom(n, uniform=i != dimension) for i, n in enumerate(shape)]
    array = array.reshape(*(n if i == dimension else 1 for i, n in enumerate(shape)))
    return make_value(array, atoms)


def slice_rule(grid: Grid, eqn: JaxprEqn, value: Value) -> Value:
    value, atoms = per_dim(value)
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    cuts, kept = [], []
    for atom, start, limit, stride, size in zip(
        atoms, starts, limits, strides, out_shapes(eqn)[0], strict=True
    ):
        cut, out = (start, limit, stride), Atom(size)
        if atom.uniform:
            cut, out = (0, 1, 1), Atom(size, uniform=True)
        elif atom.axis is not None:
            cut, out = _cut_window_atom(grid, atom, start, stride, size)
        cuts.append(cut)
        kept.append(out)
    array, positions = over_positions(
        lambda array: lax.slice(array, *zip(*cuts, strict=True)), value
    )
    return make_value(array, kept, positions)


def pad(grid: Grid, eqn: JaxprEqn, value: Value, fill: Value) -> Value:
    value, atoms = per_dim(value)
    config, padded = [], []
    for atom, (low, high, interior), size in zip(
        atoms, eqn.params["padding_config"], out_shapes(eqn)[0], strict=True
    ):
        out = Atom(size)
        if atom.axis is not None:
            if interior:
                raise Unshared("pads between the elements of the window")
            low, high, out = pad_window_atom(grid, atom, size, low, high)
        config.append((low, high, interior))
        padded.append(out)
    array, positions = over_positions(
        lambda array, fill: bind_one(eqn, array, fill, padding_config=tuple(config)),
        dense(value),
        fill,
    )
    return make_value(array, padded, positions)


def pad_window_atom(
    grid: Grid, atom: Atom, size: int, low: int, high: int
) -> tuple[int, int, Atom]:
    """How much to pad the array instead; negative padding cuts."""
    if max(low, high) > 0 and not grid.pads_image:
        raise Unshared("pads inside the window")
    if size == 1 < atom.size and not grid.pads_image:
        raise Unshared("cuts all but one element of the window away by negative padding")
    scale = atom.pitch // step(grid, atom)
    return low * scale, high * scale, atom._replace(size=size)


def concatenate(grid: Grid, eqn: JaxprEqn, *values: Value) -> Value:
    axis = eqn.params["dimension"]
    values = tuple(value for value in values if value.shape[axis])
    if any(atom.axis is not None for value in values for atom in value.dims[axis]):
        raise Unshared("joins along the window")
    fitted = align(values, but=axis)
    array, positions = over_positions(lambda *arrays: lax.concatenate(arrays, axis), *fitted)
    atoms = list(fitted[0].atoms)
    atoms[axis] = Atom(out_shapes(eqn)[0][axis])
    return make_value(array, atoms, positions)


def stack(grid: Grid, eqn: JaxprEqn, *values: Value) -> Value:
    axis = eqn.params["axis"]
    fitted = align_per_dim(values)
    array, positions = over_positions(lambda *arrays: jnp.stack(arrays, axis), *fitted)
    atoms = list(fitted[0].atoms)
    return make_value(array, [*atoms[:axis], Atom(len(values)), *atoms[axis:]], positions)


def split(grid: Grid, eqn: JaxprEqn, value: Value) -> list[Value]:
    value, atoms = per_dim(value)
    axis = eqn.params["axis"]
    if atoms[axis].axis is not None:
        raise Unshared("splits the window")
    arrays, positions = over_positions(lambda array: bind(eqn, array), dense(value))
    outs = []
    for array, size in zip(arrays, eqn.params["sizes"], strict=True):
        kept = [Atom(size) if i == axis else a._replace(uniform=False) for i, a in enumerate(atoms)]
        outs.append(make_value(array, kept, positions))
    return outs


def along(parameter: str) -> Callable[..., list[Value]]:
    """The rule for primitives along the dimensions that a parameter names, sorts and the like."""

    def rule(grid: Grid, eqn: JaxprEqn, *values: Value) -> list[Value]:
        axes = np.atleast_1d(eqn.params[parameter])
        fitted = align_per_dim(values)
        atoms = fitted[0].atoms
        if any(atoms[axis].axis is not None for axis in axes):
            raise Unshared("goes along the window")
        arrays, positions = over_positions(lambda *arrays: bind(eqn, *arrays), *fitted)
        outs = []
        for array, shape in zip(arrays, out_shapes(eqn), strict=True):
            kept = [i for i in range(len(atoms)) if len(shape) == len(atoms) or i not in axes]
            out = [
                atoms[i] if atoms[i].axis is not None else Atom(n)
                for i, n in zip(kept, shape, strict=True)
            ]
            outs.append(make_value(array, out, positions))
        return outs

    return rule


def dynamic_slice(grid: Grid, eqn: JaxprEqn, value: Value, *starts: Value) -> Value:
    """Along plain dimensions; window axes must be taken whole."""
    value, atoms = per_dim(value)
    sizes = list(eqn.params["slice_sizes"])
    value = dense(value)
    lengths = value.lengths
    for i, atom in enumerate(atoms):
        if atom.axis is not None:
            if sizes[i] != atom.size:
                raise Unshared("cuts the window at a place that depends on data")
            sizes[i] = lengths[i]

    def cut(array: Array, *starts: Array) -> Array:
        begins = [
            n if atom.axis is None else jnp.zeros_like(n)
            for atom, n in zip(atoms, starts, strict=True)
        ]
        return bind_one(eqn, array, *begins, slice_sizes=tuple(sizes))

    array, positions = over_positions(cut, value, *starts)
    out = [
        atom if atom.axis is not None else Atom(size)
        for atom, size in zip(atoms, eqn.params["slice_sizes"], strict=True)
    ]
    return make_value(array, out, positions)


def gather(grid: Grid, eqn: JaxprEqn, value: Value, indices: Value) -> Value:
    """Along plain dimensions, at the same or different places in each window."""
    value, atoms = per_dim(value)
    value = dense(value)
    numbers = eqn.params["dimension_numbers"]
    sizes = list(eqn.params["slice_sizes"])
    taken = (
        *numbers.start_index_map,
        *numbers.collapsed_slice_dims,
        *numbers.operand_batching_dims,
    )
    lengths = value.lengths
    for i, atom in enumerate(atoms):
        if atom.axis is not None:
            if i in taken or sizes[i] != atom.size:
                raise Unshared("picks elements of the window")
            sizes[i] = lengths[i]
    if any(atom.axis is not None for atom in indices.atoms):
        raise Unshared("picks elements at places inside the window")
    array, positions = over_positions(
        lambda array, indices: bind_one(eqn, array, indices, slice_sizes=tuple(sizes)),
        value,
        dense(per_dim(indices)[0]),
    )
    shape = out_shapes(eqn)[0]
    out = [Atom(n) for n in shape]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [atom for i, atom in enumerate(atoms) if i not in dropped]
    for place, atom in zip(numbers.offset_dims, kept, strict=True):
        if atom.axis is not None:
            out[place] = atom
    return make_value(array, out, positions)


def _cut_window_atom(
    grid: Grid, atom: Atom, start: int, stride: int, size: int
) -> tuple[tuple[int, int, int], Atom]:
    """Start, limit and stride in the array, and what is left."""
    assert atom.axis is not None
    out = window_atom(grid, size, atom.axis, atom.pitch * stride)
    q = step(grid, atom)
    begin = start * atom.pitch // q
    last = (grid.stride[atom.axis] * (grid.counts[atom.axis] - 1) + out.pitch * (size - 1)) // q
    return (begin, begin + last + 1, step(grid, out) // q), out
