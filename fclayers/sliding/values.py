"""Arrays that stand for a value of every window at once.

A value of the function for one window has a shape. Its dimensions are products of *atoms*. Most
atoms are plain. A *window atom* runs along a window axis of the image: its elements are `pitch`
pixels apart, and the array holds, once, the elements of all windows along that axis. Neighbours in
the array are `gcd(stride, pitch)` pixels apart, so element `j` of window `i` is in the array at

    (i * stride + j * pitch) / gcd(stride, pitch).

A *uniform* atom is the same everywhere, and has size 1 in the array. When nothing of a window axis
is left inside the window, the axis is a *position axis*: the array then has it in front, with one
element per window. A value with neither is a constant.

After upsampling, the pitch may be a fraction of a pixel, and the positions of a window axis may be
split into *phases*: every `d`-th window is in one phase, and the array has an axis of length `d` in
front of everything else (see `phases.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from math import gcd, prod
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

Results = TypeVar("Results", bound=PyTree[Array])


class Unshared(Exception):
    """Why a step of the function cannot be shared between windows."""


class Grid(NamedTuple):
    """Where the windows lie: one entry per window axis of the image."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    counts: tuple[int, ...]
    pads_image: bool


class Atom(NamedTuple):
    """A factor of a dimension; `axis` is the window axis that it runs along, if any."""

    size: int
    axis: int | None = None
    pitch: int | Fraction = 0
    uniform: bool = False


class Value(NamedTuple):
    """An array with the position axes in front, then one axis per atom; the atoms by dimension.

    `phases` are the split window axes, and the number of phases of each.
    """

    array: Array
    dims: tuple[tuple[Atom, ...], ...]
    positions: tuple[int, ...] = ()
    phases: tuple[tuple[int, int], ...] = ()

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(atom for dim in self.dims for atom in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def leading(self) -> tuple[int, ...]:
        """Lengths of the position axes."""
        return self.array.shape[: len(self.positions)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the atoms' axes in the array."""
        return self.array.shape[len(self.positions) :]

    @property
    def is_constant(self) -> bool:
        return not self.positions and all(atom.axis is None for atom in self.atoms)


def constant(array: ArrayLike) -> Value:
    """The same for all windows; what is concrete stays so while the function is traced."""
    with while_tracing(array):
        array = jnp.asarray(array)
        return make_value(array, [Atom(size) for size in array.shape])


def while_tracing(*arrays: ArrayLike) -> AbstractContextManager[None]:
    """Where operations on concrete arrays give concrete arrays, inside of `jax.jit` as well."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return nullcontext()
    return jax.ensure_compile_time_eval()


def axis_of(atom: Atom) -> int:
    """The window axis of a window atom."""
    assert atom.axis is not None
    return atom.axis


def step(grid: Grid, atom: Atom) -> Fraction:
    """Pixels between neighbors along a window atom's axis in the array."""
    stride, pitch = grid.stride[axis_of(atom)], Fraction(atom.pitch)
    return Fraction(gcd(stride * pitch.denominator, pitch.numerator), pitch.denominator)


def window_atom(grid: Grid, size: int, axis: int, pitch: int | Fraction) -> Atom:
    """A single element needs no pitch; with the stride as its pitch, the array has no gaps."""
    alone = size == 1 and not grid.pads_image
    return Atom(size, axis, grid.stride[axis] if alone else pitch)


def make_value(array: Array, atoms: Sequence[Atom], positions: tuple[int, ...] = ()) -> Value:
    """A value with one atom per dimension; a plain dimension of size 1 has none."""
    dims = tuple(() if atom.axis is None and atom.size == 1 else (atom,) for atom in atoms)
    start = len(positions)
    lengths = [n for n, dim in zip(array.shape[start:], dims, strict=True) if dim]
    return Value(array.reshape(*array.shape[:start], *lengths), dims, positions)


def sections(value: Value) -> list[list[tuple[Atom, int]]]:
    """For every dimension its atoms, each with its length in the array."""
    lengths = iter(value.lengths)
    return [[(atom, next(lengths)) for atom in dim] for dim in value.dims]


def per_dim(value: Value) -> tuple[Value, list[Atom]]:
    """The value with one array axis and one atom per dimension."""
    shape, merged, atoms = [], [], []
    for section in sections(value):
        if len(section) == 1:
            ((atom, length),) = section
            shape.append(length)
            merged.append(length)
        elif any(atom.axis is not None for atom, _ in section):
            raise Unshared("takes window axes merged with others")
        else:
            atom = Atom(prod(atom.size for atom, _ in section))
            shape += [atom.size for atom, _ in section]
            merged.append(atom.size)
        atoms.append(atom)
    array = jnp.broadcast_to(value.array, (*value.leading, *shape))
    array = array.reshape(*value.leading, *merged)
    return Value(array, tuple((atom,) for atom in atoms), value.positions), atoms


def dense(value: Value) -> Value:
    """The value without uniform atoms."""
    lengths = [
        atom.size if atom.uniform else length for dim in sections(value) for atom, length in dim
    ]
    array = jnp.broadcast_to(value.array, (*value.leading, *lengths))
    dims = tuple(tuple(atom._replace(uniform=False) for atom in dim) for dim in value.dims)
    return Value(array, dims, value.positions)


def whole(value: Value) -> Value:
    """A value without window atoms, with one plain array axis for every dimension."""
    array = dense(value).array.reshape(*value.leading, *value.shape)
    return Value(array, tuple((Atom(size),) for size in value.shape), value.positions)


def over_positions(
    function: Callable[..., Results], *values: Value
) -> tuple[Results, tuple[int, ...]]:
    """Maps a function of the arrays over the position axes; returns its result and the axes."""
    positions = tuple(sorted({axis for value in values for axis in value.positions}))
    if any(atom.axis in positions for value in values for atom in value.atoms):
        raise Unshared("brings a value of a whole window to elements of the window")
    for axis in reversed(positions):
        in_axes = tuple(0 if axis in value.positions else None for value in values)
        function = jax.vmap(function, in_axes=in_axes)
    try:
        return function(*(value.array for value in values)), positions
    except NotImplementedError as error:
        raise Unshared("cannot be mapped over windows (jax.vmap)") from error
