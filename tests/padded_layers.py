"""Padding of a window axis, pools and flattening, in the ways that frameworks have them."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax


class Geometry(NamedTuple):
    """Of a convolution or a pool, one entry per window axis, and what the padding is called."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    mode: str

    def name(self, operation):
        dilated = "dilated " if max(self.dilations) > 1 else ""
        mode = self.mode if np.any(self.padding) else "VALID"
        strided = ", strided" if max(self.strides) > 1 else ""
        return f"{dilated}{operation} {mode}{strided}"


# How frameworks flatten a map of height, width and channels before a dense layer.
FLATTEN = {
    "HWC": lambda x: x.reshape(-1),
    "CHW": lambda x: jnp.moveaxis(x, -1, 0).reshape(-1),
    "WHC": lambda x: x.transpose(*reversed(range(x.ndim - 1)), x.ndim - 1).reshape(-1),
}


def pad_axis(size, k, s, d, mode, drawn=(0, 0)):
    """The padding before and after an axis."""
    extent = (k - 1) * d + 1
    if mode == "ceil":
        count = -(-max(size - extent, 0) // s) + 1
        count -= (count - 1) * s >= size  # as PyTorch and Caffe: no window begins in the padding
        return 0, max((count - 1) * s + extent - size, 0)
    if mode in ("SAME", "SAME_LOWER"):
        total = max((-(-size // s) - 1) * s + extent - size, 0)
        half = total // 2
        return (half, total - half) if mode == "SAME" else (total - half, half)
    low, high = drawn
    return low, max(high, extent - size - low)


def reads_everywhere(size, k, s, pair, d):
    """Whether no window of a pool lies in the padding."""
    count = (size + sum(pair) - (k - 1) * d - 1) // s + 1
    places = np.arange(count)[:, None] * s - pair[0] + d * np.arange(k)
    return bool(((places >= 0) & (places < size)).any(1).all())


def reduce_windows(kind, geometry, whole):
    """A pool as other frameworks write it; counts for all channels (`whole`) or for one."""
    kernel, strides, padding, dilations, _ = geometry

    def reduce(x, initial, monoid):
        return lax.reduce_window(
            x,
            np.array(initial, x.dtype),
            monoid,
            (*kernel, 1),
            (*strides, 1),
            (*padding, (0, 0)),
            window_dilation=(*dilations, 1),
        )

    def layer(p, x):
        if kind in ("max", "min"):
            return reduce(x, *{"max": (-np.inf, lax.max), "min": (np.inf, lax.min)}[kind])
        total = reduce(x, 0.0, lax.add)
        if kind == "avg by counts":
            ones = jnp.ones_like(x) if whole else jnp.ones((*x.shape[:-1], 1), x.dtype)
            return total / reduce(ones, 0.0, lax.add)
        return total / prod(kernel) if kind == "avg" else total

    return layer
