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


class WindowCase(NamedTuple):
    """An input `(*batch, *spatial, channels)` in float64 and where a window goes over it."""

    x: np.ndarray
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...]
    padding: str | int | tuple[tuple[int, int], ...]
    dilation: int | tuple[int, ...]

    def windows(self, padding_value=0.0):
        """Every window, cut out in a loop: `(*batch, *positions, *kernel, channels)`."""
        ndim = len(self.kernel)
        strides, dilations = self.per_axis(self.stride), self.per_axis(self.dilation)
        spatial = self.x.shape[-ndim - 1 : -1]
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, dilations, strict=True)]
        if self.padding == "SAME":
            needed = [
                max((-(-size // s) - 1) * s + r - size, 0)
                for size, s, r in zip(spatial, strides, reach, strict=True)
            ]
            pairs = [(n // 2, n - n // 2) for n in needed]
        elif self.padding == "VALID":
            pairs = [(0, 0)] * ndim
        else:
            integer = isinstance(self.padding, int)
            pairs = [(self.padding,) * 2] * ndim if integer else self.padding
        batch_ndim = self.x.ndim - ndim - 1
        width = [(0, 0)] * batch_ndim + list(pairs) + [(0, 0)]
        padded = np.pad(self.x, width, constant_values=padding_value)
        counts = [(padded.shape[batch_ndim + i] - reach[i]) // strides[i] + 1 for i in range(ndim)]
        cut = np.empty((*self.x.shape[:batch_ndim], *counts, *self.kernel, self.x.shape[-1]))
        for position in np.ndindex(*counts):
            window = tuple(
                slice(p * s, p * s + r, d)
                for p, s, r, d in zip(position, strides, reach, dilations, strict=True)
            )
            cut[(..., *position, *[slice(None)] * (ndim + 1))] = padded[(..., *window, slice(None))]
        return cut

    def per_axis(self, value):
        return value if isinstance(value, tuple) else (value,) * len(self.kernel)


@st.composite
def window_cases(draw, *, channels=None):
    ndim = draw(st.integers(1, 3))

    def for_axes(entry):
        return st.tuples(*[entry] * ndim)

    kernel = draw(for_axes(st.integers(1, 3)))
    dilation = draw(st.integers(1, 2) | for_axes(st.integers(1, 2)))
    stride = draw(st.integers(1, 3) | for_axes(st.integers(1, 3)))
    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(st.sampled_from(["VALID", "SAME", 0, 1]) | for_axes(pair))
    dilations = dilation if isinstance(dilation, tuple) else (dilation,) * ndim
    extra = draw(for_axes(st.integers(0, 4)))
    spatial = [(k - 1) * d + 1 + e for k, d, e in zip(kernel, dilations, extra, strict=True)]
    batch_shape = draw(st.lists(st.integers(0, 3), max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.integers(1, 4)) if channels is None else channels
    x = rng.standard_normal((*batch_shape, *spatial, channels))
    return WindowCase(x, kernel, stride, padding, dilation)
