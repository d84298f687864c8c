"""Convolutions with few products per output, as sums of shifted inputs times one weight each.

XLA's CPU backend runs depthwise and grouped convolutions, and those of one to three channels, far
below the speed of its elementwise operations, which is what such a sum is.
"""

from math import prod

import jax.numpy as jnp
from jax import lax
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
    terms, channels = prod(weight.shape[:-1]), weight.shape[-2]
    apart = groups > 1 and channels == 1 and terms <= CROSSOVERS.bordered_terms

    def with_bias(x: Array, weight: Array, bias: Array | None) -> Array:
        sums = _sums_with_borders_apart if apart else shifted_sums
        return add_bias(sums(x, weight, geometry, groups), bias, x.dtype)

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


def _sums_with_borders_apart(x: Array, weight: Array, geometry: Geometry, groups: int) -> Array:
    """As `shifted_sums`, but only the borders of the map are padded, which is a copy."""
    for i in range(len(geometry.kernel)):
        sections = _sections(x.shape[1:-1], i, geometry)
        if len(sections) > 1:
            parts = []
            for start, stop, pair in sections:
                inputs = lax.slice_in_dim(x, start, stop, axis=1 + i)
                padding = (*geometry.padding[:i], pair, *geometry.padding[i + 1 :])
                sums = shifted_sums if any(pair) else _sums_with_borders_apart
                parts.append(sums(inputs, weight, geometry._replace(padding=padding), groups))
            return jnp.concatenate(parts, axis=1 + i)
    return shifted_sums(x, weight, geometry, groups)


def _sections(
    spatial: tuple[int, ...], i: int, geometry: Geometry
) -> list[tuple[int, int, tuple[int, int]]]:
    """The outputs along spatial axis `i`, cut where windows begin or end to reach into the padding.

    For every section where its inputs start and stop, and how they are padded.
    """
    size, outputs = spatial[i], positions(spatial, geometry)[i]
    stride, (low, high) = geometry.strides[i], geometry.padding[i]
    reach = (geometry.kernel[i] - 1) * geometry.dilations[i]
    first, last = -(-low // stride), (size - 1 - reach + low) // stride + 1
    if not low <= reach >= high or first >= last:
        return [(0, size, (low, high))]
    sections = [(first * stride - low, (last - 1) * stride - low + reach + 1, (0, 0))]
    if first > 0:
        sections.insert(0, (0, (first - 1) * stride - low + reach + 1, (low, 0)))
    if last < outputs:
        start = last * stride - low
        sections.append((start, size, (0, (outputs - 1) * stride - low + reach + 1 - size)))
    return sections
