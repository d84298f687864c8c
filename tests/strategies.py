"""Random layers, inputs and axes for property tests, and the formula they are held against."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import fclayers as fc


class LinearCase(NamedTuple):
    """NumPy arrays in float64 (or complex128); `x` has its features at `axis`, anywhere."""

    weight: np.ndarray
    bias: np.ndarray | None
    x: np.ndarray
    axis: int | tuple[int, ...]

    def params(self, dtype=jnp.float32):
        bias = None if self.bias is None else jnp.asarray(self.bias, dtype)
        return fc.LinearParams(jnp.asarray(self.weight, dtype), bias)

    def expected(self, weight=None, bias=None, x=None):
        """Σ over the feature axes in float64, one letter per axis."""
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        x = self.x if x is None else x
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        letters = "abcdefghij"[: x.ndim]
        contracted = "".join(letters[axis] for axis in axes)
        kept = "".join(letter for letter in letters if letter not in contracted)
        outputs = "uvwxyz"[: weight.ndim - len(axes)]
        y = np.einsum(f"{letters},{contracted}{outputs}->{kept}{outputs}", x, weight)
        return y if bias is None else y + bias


@st.composite
def linear_cases(draw, *, batch_ndim=(0, 3), batch_size=(0, 4), complex=False):
    """`batch_ndim` and `batch_size` are the least and the greatest to draw."""
    size = st.integers(1, 6)
    in_shape = draw(st.lists(size, min_size=1, max_size=3))
    out_shape = draw(st.lists(size, min_size=0, max_size=2))
    ndim = draw(st.integers(*batch_ndim))
    batch_shape = draw(st.lists(st.integers(*batch_size), min_size=ndim, max_size=ndim))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(shape):
        values = rng.standard_normal(shape)
        return values + 1j * rng.standard_normal(shape) if complex else values

    weight = array(in_shape + out_shape) / np.sqrt(prod(in_shape))
    bias = array(out_shape) if draw(st.booleans()) else None
    x_ndim = ndim + len(in_shape)
    axes = draw(st.permutations(range(x_ndim)))[: len(in_shape)]
    batch = iter(batch_shape)
    x_shape = [in_shape[axes.index(a)] if a in axes else next(batch) for a in range(x_ndim)]
    axis = tuple(a - x_ndim if draw(st.booleans()) else a for a in axes)
    if len(axis) == 1 and draw(st.booleans()):
        (axis,) = axis
    return LinearCase(weight, bias, array(x_shape), axis)
