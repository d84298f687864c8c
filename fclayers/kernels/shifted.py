"""Convolutions with few products per output, as sums of shifted inputs times one weight each.

XLA's CPU backend runs depthwise and grouped convolutions, and those of one to three channels, far
below the speed of its elementwise operations, which is what such a sum is.
"""

from math import prod

import jax.numpy as jnp
from jaxtyping import Array

from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.product import add_bias
from fclayers.kernels.unfused import unfused
from fclayers.kernels.windows import Geometry, pad, positions, taps


def shifted_sums_win(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry, groups: int
) -> bool:
    """Whether `shifted_convolve` is faster for a map `(N, *spatial, in)`."""
    terms, features = prod(weight_shape[:-1]), weight_shape[-1]
    if groups > 1:
        return 0 < terms <= CROSSOVERS.grouped_terms
    rows = x_shape[0] * prod(positions(x_shape[1:-1], geometry))
    return (
        1 < terms <= CROSSOVERS.shifted_terms
        and weight_shape[-2] <= CROSSOVERS.shifted_channels
        and features <= CROSSOVERS.shifted_features
        and rows >= CROSSOVERS.shifted_rows
    )


def shifted_convolve(
    x: Array, weight: Array, geometry: Geometry, groups: int, bias: Array | None = None
) -> Array:
    """Convolves `(N, *spatial, in)` with `(*kernel, in // groups, out)`, and adds a bias."""

    def with_bias(x: Array, weight: Array, bias: Array | None) -> Array:
        return add_bias(shifted_sums(x, weight, geometry, groups), bias, x.dtype)

    return unfused(with_bias, x, weight, bias)


def shifted_sums(x: Array, weight: Array, geometry: Geometry, groups: int) -> Array:
    """As `shifted_convolve` without a bias, but XLA may fuse the result into what reads it."""
    ndim = len(geometry.kernel)
    shifted = [pad(x, geometry.padding, 0)]
    for i in range(ndim):
        shifted = [tap for part in shifted for tap in taps(part, i, geometry)]
    channels, features = weight.shape[-2:]
    flat = weight.reshape(prod(geometry.kernel), channels, features)
    total: Array | None = None
    for tap, row in zip(shifted, flat, strict=True):
        for c in range(channels):
            inputs = tap[..., c::channels]
            if groups > 1 and features != groups:
                inputs = jnp.repeat(inputs, features // groups, axis=-1)
            term = inputs * row[c]
            total = term if total is None else total + term
    assert total is not None
    return total
