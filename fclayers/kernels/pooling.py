"""Maxima, minima and sums of windows, in the formulation that is fastest on CPUs.

XLA's CPU backend reduces windows element by element. Maxima of slices, one spatial axis after the
other, are several times faster. The gradient of a sum of small windows that do not overlap is
fastest where it is a broadcast, not a sum of padded slices.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers.kernels.crossovers import CROSSOVERS


class Pool(NamedTuple):
    """A window of `lax.reduce_window`: everything per axis of the array."""

    window: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilations: Sequence[int]

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side."""
        return (
            tuple(self.strides) == tuple(self.window)
            and max(self.dilations) == 1
            and not any(side for pair in self.padding for side in pair)
        )


def reduce_windows(x: Array, kind: Literal["max", "min", "sum"], pool: Pool) -> Array:
    """Reduces every window; padding does not count."""
    initial, monoid, combine = _initial(kind, x.dtype), *_REDUCERS[kind]

    def axis_by_axis(x: Array) -> Array:
        small = prod(pool.window) <= CROSSOVERS.broadcast_window
        if kind == "sum" and pool.tiles and small and jnp.issubdtype(x.dtype, jnp.inexact):
            return _sum_tiles(tuple(pool.window), x)
        x = lax.pad(x, initial, [(*pair, 0) for pair in pool.padding])
        # The last axis first, so that the first of equal maxima in memory gets the gradient.
        for axis in reversed(range(x.ndim)):
            x = reduce(combine, _taps(x, axis, pool))
        return x

    def at_once(x: Array) -> Array:
        window, strides, padding, dilations = pool
        y: Array = lax.reduce_window(
            x, initial, monoid, window, strides, padding, window_dilation=dilations
        )
        return y

    if kind != "sum" and max(pool.dilations) > 1:
        return axis_by_axis(x)  # reduce_window has no gradient for it, on any platform
    y: Array = lax.platform_dependent(x, cpu=axis_by_axis, default=at_once)
    return y


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_tiles(window: tuple[int, ...], x: Array) -> Array:
    ones, none = (1,) * x.ndim, ((0, 0),) * x.ndim
    for axis in reversed(range(x.ndim)):
        x = reduce(lax.add, _taps(x, axis, Pool(window, window, none, ones)))
    return x


@_sum_tiles.defjvp
def _sum_tiles_jvp(
    window: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    counts = [size // k for size, k in zip(x.shape, window, strict=True)]
    whole = [count * k for count, k in zip(counts, window, strict=True)]
    tiles = lax.slice(x_dot, [0] * x.ndim, whole).reshape(
        *(size for pair in zip(counts, window, strict=True) for size in pair)
    )
    return _sum_tiles(window, x), tiles.sum(tuple(range(1, 2 * x.ndim, 2)))


def _taps(x: Array, axis: int, pool: Pool) -> list[Array]:
    """For every element of the window along the axis, its values at all positions."""
    size, stride, dilation = pool.window[axis], pool.strides[axis], pool.dilations[axis]
    span = (x.shape[axis] - (size - 1) * dilation - 1) // stride * stride + 1
    starts = range(0, size * dilation, dilation)
    return [lax.slice_in_dim(x, start, start + span, stride, axis) for start in starts]


def _first_max(a: Array, b: Array) -> Array:
    """The maximum, NaN if there is one; of two equals `a`, which also gets the gradient."""
    return jnp.where((b > a) | (b != b), b, a)


def _first_min(a: Array, b: Array) -> Array:
    return jnp.where((b < a) | (b != b), b, a)


_REDUCERS: dict[str, tuple[Callable[..., Any], Callable[..., Array]]] = {
    "max": (lax.max, _first_max),
    "min": (lax.min, _first_min),
    "sum": (lax.add, lax.add),
}


def _initial(kind: str, dtype: Any) -> np.ndarray:
    if kind == "sum":
        return np.array(0, dtype)
    sign = -1 if kind == "max" else 1
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.array(sign * np.inf, dtype)
    info = np.iinfo(dtype)
    return np.array(info.min if kind == "max" else info.max, dtype)
