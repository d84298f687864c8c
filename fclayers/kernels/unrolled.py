"""Convolutions of many tiny maps as one matrix product.

XLA's CPU backend runs a convolution of maps a few elements wide, of which there are thousands, at a
fraction of the speed of a product. The product has the same operations where maps are as small as
the kernel, and zeros in place of taps that miss.
"""

from math import prod

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.product import matrix_product
from fclayers.kernels.windows import Geometry, positions


def is_tiny(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether `unrolled_convolve` is faster for a map `(N, *spatial, in)`."""
    inputs, kernel = prod(x_shape[1:-1]), prod(weight_shape[:-2])
    outputs = prod(positions(x_shape[1:-1], geometry))
    weights = inputs * outputs * weight_shape[-2] * weight_shape[-1]
    return inputs <= CROSSOVERS.tiny_elements * kernel and weights <= CROSSOVERS.tiny_weights


def unrolled_convolve(
    x: Array, weight: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    """Convolves `(N, *spatial, in)` with `(*kernel, in, out)`."""
    spatial = x.shape[1:-1]
    outputs = positions(spatial, geometry)
    ndim = len(spatial)
    ins, outs, taps = "xyz"[:ndim], "uvw"[:ndim], "klm"[:ndim]
    hits = [
        _hits(size, count, *along)
        for size, count, along in zip(spatial, outputs, zip(*geometry, strict=True), strict=True)
    ]
    terms = [f"{i}{o}{k}" for i, o, k in zip(ins, outs, taps, strict=True)]
    matrix = jnp.einsum(
        f"{','.join(terms)},{taps}ab->{ins}a{outs}b",
        *(jnp.asarray(hit, weight.dtype) for hit in hits),
        weight,
        precision=lax.Precision.HIGHEST,
    )
    fan_in, fan_out = prod(spatial) * x.shape[-1], prod(outputs) * weight.shape[-1]
    rows = x.reshape(x.shape[0], fan_in)
    y = matrix_product(rows, matrix.reshape(fan_in, fan_out), precision)
    return y.reshape(x.shape[0], *outputs, weight.shape[-1])


def _hits(
    size: int, outputs: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> np.ndarray:
    """(inputs, outputs, taps): 1 where an output reads an input by a tap."""
    place = np.arange(outputs)[:, None] * stride - padding[0] + np.arange(kernel) * dilation
    hits: np.ndarray = np.arange(size)[:, None, None] == place
    return hits.astype(np.int8)
