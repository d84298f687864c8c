"""Rules for primitives with windows of their own: convolutions, pools, reductions of the window."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.jaxprs import aval, bind, bind_one, out_shapes
from fclayers.kernels.convolution import convolve
from fclayers.kernels.pooling import Pool, reduce_windows
from fclayers.kernels.unrolled import is_tiny, unrolled_convolve
from fclayers.kernels.windows import Geometry, Pairs
from fclayers.sliding.layout import drop_atom
from fclayers.sliding.phases import NeedsPhases
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    axis_of,
    dense,
    make_value,
    over_positions,
    per_dim,
    step,
    window_atom,
)

Kind = Literal["max", "min", "sum"]
Sizes = tuple[int, ...]

_POOLS: dict[str, Kind] = {
    "reduce_window_max": "max",
    "reduce_window_min": "min",
    "reduce_window_sum": "sum",
}


def conv(grid: Grid, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Value:
    params = eqn.params
    (batch, feature, *spatial), _, out_spec = params["dimension_numbers"]
    if any(atom.axis is not None for atom in rhs.atoms):
        raise Unshared("convolves with a kernel that varies from window to window")
    lhs, atoms = per_dim(lhs)
    if atoms[feature].axis is not None:
        raise Unshared("convolves with a window axis as its features")
    if atoms[batch].axis is not None and params["batch_group_count"] > 1:
        raise Unshared("splits a window axis into groups")
    shape = out_shapes(eqn)[0]
    steps = [
        _window_step(grid, atoms[dim], shape[out], *geometry)
        for dim, out, geometry in zip(
            spatial,
            out_spec[2:],
            zip(
                params["window_strides"],
                params["padding"],
                params["lhs_dilation"],
                params["rhs_dilation"],
                strict=True,
            ),
            strict=True,
        )
    ]
    strides, padding, dilations, kept = zip(*steps, strict=True) if steps else ((), (), (), ())
    geometry = (strides, padding, dilations)
    tiny = all(atom.axis is None for atom in atoms)
    array, positions = over_positions(
        lambda lhs, rhs: _convolve(eqn, lhs, rhs, *geometry, tiny=tiny),
        dense(lhs),
        dense(per_dim(rhs)[0]),
    )
    out_atoms = [Atom(size) for size in shape]
    if atoms[batch].axis is not None:
        out_atoms[out_spec[0]] = atoms[batch]
    for dim, atom in zip(out_spec[2:], kept, strict=True):
        out_atoms[dim] = atom
    return make_value(array, out_atoms, positions)


def reduce_window(grid: Grid, eqn: JaxprEqn, *values: Value) -> list[Value]:
    """For sums, maxima, minima, and with any function; initial values come last, if at all."""
    params = eqn.params
    operands = values[: len(eqn.outvars)]
    split = [per_dim(value) for value in operands]
    if any(atoms != split[0][1] for _, atoms in split):
        raise Unshared("reduces windows of values that lie differently in the window")
    shape = out_shapes(eqn)[0]
    steps = [
        _window_step(grid, *geometry)
        for geometry in zip(
            split[0][1],
            shape,
            params["window_strides"],
            params["padding"],
            params["base_dilation"],
            params["window_dilation"],
            strict=True,
        )
    ]
    strides, padding, dilations, kept = zip(*steps, strict=True)
    arrays, positions = over_positions(
        lambda *arrays: _reduce(eqn, arrays, strides, padding, dilations),
        *(dense(value) for value, _ in split),
        *values[len(operands) :],
    )
    return [make_value(array, kept, positions) for array in arrays]


def _convolve(
    eqn: JaxprEqn,
    lhs: Array,
    rhs: Array,
    strides: Sizes,
    padding: Pairs,
    dilations: Sizes,
    *,
    tiny: bool,
) -> Array:
    """What the equation does, on CPUs in the formulation that is fastest for the shape.

    Maps without window axes may be `tiny`, of which there is one for every position.
    """
    params = eqn.params
    (batch, feature, *spatial), (out, in_, *kernel_axes), out_spec = params["dimension_numbers"]

    def plain(lhs: Array, rhs: Array) -> Array:
        geometry = {"window_strides": strides, "padding": padding, "rhs_dilation": dilations}
        return bind_one(eqn, lhs, rhs, **geometry)

    def channels_last(lhs: Array, rhs: Array) -> Array:
        kernel = rhs.transpose(*kernel_axes, in_, out)
        geometry = Geometry(kernel.shape[:-2], strides, padding, dilations)
        x = lhs.transpose(batch, *spatial, feature)
        if not tiny:
            y = convolve(x, kernel, geometry, params["feature_group_count"], params["precision"])
        elif is_tiny(x.shape, kernel.shape, geometry):
            y = unrolled_convolve(x, kernel, geometry, params["precision"])
        else:
            return plain(lhs, rhs)
        return jnp.moveaxis(y, range(y.ndim), (out_spec[0], *out_spec[2:], out_spec[1]))

    usual = lhs.dtype == rhs.dtype == aval(eqn.outvars[0]).dtype and lhs.dtype.itemsize >= 4
    if (
        usual
        and 1 <= len(spatial) <= 3
        and params["batch_group_count"] == 1
        and (not tiny or params["feature_group_count"] == 1)
        and set(params["lhs_dilation"]) == {1}
    ):
        y: Array = lax.platform_dependent(lhs, rhs, cpu=channels_last, default=plain)
        return y
    return plain(lhs, rhs)


def _reduce(
    eqn: JaxprEqn, arrays: Sequence[Array], strides: Sizes, padding: Pairs, dilations: Sizes
) -> list[Array]:
    kind = _POOLS.get(eqn.primitive.name)
    if (
        kind
        and (kind == "sum" or _is_ordered(arrays[0]))
        and set(eqn.params["base_dilation"]) == {1}
    ):
        window = eqn.params["window_dimensions"]
        return [reduce_windows(arrays[0], kind, Pool(window, strides, padding, dilations))]
    return bind(eqn, *arrays, window_strides=strides, padding=padding, window_dilation=dilations)


def reduction(kind: Kind) -> Callable[[Grid, JaxprEqn, Value], Value]:
    """The rule for a reduction of dimensions; of window axes, it is a pool as large as the map."""

    def rule(grid: Grid, eqn: JaxprEqn, value: Value) -> Value:
        value = dense(value)
        if kind != "sum" and not _is_ordered(value.array):
            raise Unshared(f"compares {value.array.dtype} elements")
        axes = eqn.params["axes"]
        reduced = [i in axes for i, dim in enumerate(value.dims) for _ in dim]
        plain = [
            i
            for i, (atom, gone) in enumerate(zip(value.atoms, reduced, strict=True))
            if gone and atom.axis is None
        ]
        array, positions = value.array, value.positions
        if plain:
            array, positions = over_positions(
                lambda array: bind_one(eqn, array, axes=tuple(plain)), value
            )
        dims = tuple(
            tuple(atom for atom in dim if i not in axes or atom.axis is not None)
            for i, dim in enumerate(value.dims)
        )
        result = Value(array, dims, positions)
        for atom, gone in zip(value.atoms, reduced, strict=True):
            if gone and atom.axis is not None:
                result = _reduce_window_atom(grid, result, atom, kind)
        return result._replace(dims=tuple(d for i, d in enumerate(result.dims) if i not in axes))

    return rule


def _is_ordered(array: Array) -> bool:
    """Whether there is a smallest number; there is none among complex ones and booleans."""
    kinds = (jnp.floating, jnp.integer)
    return any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def _reduce_window_atom(grid: Grid, value: Value, atom: Atom, kind: Kind) -> Value:
    axis = len(value.positions) + value.atoms.index(atom)
    q = step(grid, atom)
    window, strides, dilations = np.ones((3, value.array.ndim), int)
    window[axis] = atom.size
    strides[axis] = grid.stride[axis_of(atom)] // q
    dilations[axis] = atom.pitch // q
    padding = [(0, 0)] * value.array.ndim
    pool = Pool(window.tolist(), strides.tolist(), padding, dilations.tolist())
    array = reduce_windows(value.array, kind, pool)
    array = lax.slice_in_dim(array, 0, grid.counts[axis_of(atom)], axis=axis)
    return drop_atom(value, atom, array)


def _window_step(
    grid: Grid,
    atom: Atom,
    size: int,
    stride: int,
    padding: tuple[int, int],
    base_dilation: int,
    dilation: int,
) -> tuple[int, tuple[int, int], int, Atom]:
    """Stride, padding and dilation on the array, and the atom of the result."""
    if atom.axis is None:
        return stride, padding, dilation, Atom(size)
    out = window_atom(grid, size, atom.axis, Fraction(atom.pitch) * stride / base_dilation)
    q = step(grid, atom)
    if base_dilation != 1 and q != atom.pitch:
        raise NeedsPhases(atom.axis, int(atom.pitch // q))
    # Zeros between elements are the same for all windows, those before and behind them are not.
    if max(padding) >= base_dilation and not grid.pads_image:
        raise Unshared("pads inside the window")
    scale = int(atom.pitch // q)
    low, high = padding
    apart = int(step(grid, out) // (q / base_dilation))
    return apart, (low * scale, high * scale), dilation * scale, out
