"""A layer with its weight in every form, by name, for tests."""

from math import gcd, prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fclayers as fc
from fclayers.weights.form import layer_shapes


def in_ndim(layer):
    return len(layer_shapes(layer)[0])


def rank(layer):
    return min(3, *map(prod, layer_shapes(layer)))


def in_blocks(layer):
    """One scale for every place on the first input axis."""
    return fc.quantize(layer, block_size=prod(layer_shapes(layer)[0][1:]))


def adapted(layer):
    """With an adapter that does something."""
    layer = fc.add_lora(jax.random.key(3), layer, rank=rank(layer), alpha=2.0)
    up = jnp.cos(jnp.arange(layer.weight.up.size, dtype=layer.weight.up.dtype))
    return layer._replace(weight=layer.weight._replace(up=up.reshape(layer.weight.up.shape)))


def normalized(layer):
    """With magnitudes other than the norms of the columns."""
    layer = fc.weight_norm(layer)
    magnitude = layer.weight.magnitude
    factor = 1 + jnp.sin(jnp.arange(magnitude.size, dtype=magnitude.dtype)) / 2
    magnitude = magnitude * factor.reshape(magnitude.shape)
    return layer._replace(weight=layer.weight._replace(magnitude=magnitude))


def block_diagonal(layer):
    in_shape, out_shape = layer_shapes(layer)
    if not in_shape or not out_shape:
        return layer
    return fc.block_diagonal(layer, num_blocks=gcd(in_shape[-1], out_shape[-1]))


def transposed(layer):
    inputs = range(in_ndim(layer))
    array = jnp.moveaxis(layer.weight, inputs, range(-len(inputs), 0))
    return layer._replace(weight=fc.Transposed(array))


# Functions of a layer whose weight is an array; without a bias, of one with one output axis.
FORMS = {
    "plain": lambda layer: layer,
    "low rank": lambda layer: fc.low_rank(layer, rank=rank(layer)),
    "adapted": adapted,
    "int8": fc.quantize,
    "int8 in blocks": in_blocks,
    "adapted int8": lambda layer: adapted(fc.quantize(layer)),
    "normalized": normalized,
    "normalized int8": lambda layer: normalized(fc.quantize(layer)),
    "dora": lambda layer: normalized(adapted(layer)),
    "dora on int8": lambda layer: normalized(adapted(fc.quantize(layer))),
    "block diagonal": block_diagonal,
    "adapted low rank": lambda layer: adapted(fc.low_rank(layer, rank=rank(layer))),
    "adapted blocks": lambda layer: adapted(block_diagonal(layer)),
    "transposed": transposed,
    "adapted transposed": lambda layer: adapted(transposed(layer)),
}


def weight_of(weight, in_ndim):
    """The array that a weight stands for, in float64 NumPy, written out by its definition."""
    match weight:
        case fc.LowRank(down, up):
            return np.tensordot(np.asarray(down, np.float64), np.asarray(up, np.float64), 1)
        case fc.Lora(base, down, up, scale):
            adapter = weight_of(fc.LowRank(down, up), in_ndim)
            return weight_of(base, in_ndim) + float(scale) * adapter
        case fc.Int8(values, scale):
            shape = (len(scale), -1, *scale.shape[1:])
            blocks = np.asarray(values, np.float64).reshape(shape)
            return (blocks * np.asarray(scale, np.float64)[:, None]).reshape(values.shape)
        case fc.WeightNorm(direction, magnitude):
            matrix = weight_of(direction, in_ndim)
            norms = np.sqrt((matrix**2).sum(tuple(range(in_ndim))))
            return matrix * np.asarray(magnitude, np.float64) / np.where(norms > 0, norms, 1)
        case fc.Transposed(array):
            outputs = range(array.ndim - in_ndim)
            return np.moveaxis(np.asarray(array, np.float64), outputs, range(-len(outputs), 0))
        case fc.BlockDiagonal(blocks):
            return _written_out(np.asarray(blocks, np.float64), in_ndim)
    return np.asarray(weight, np.float64)


def _written_out(blocks, in_ndim):
    num_blocks, *shape = blocks.shape
    i, o = in_ndim - 1, len(shape) - 1
    size_in, size_out = shape[i], shape[o]
    shape[i], shape[o] = num_blocks * size_in, num_blocks * size_out
    matrix = np.zeros(shape)
    for b in range(num_blocks):
        place = [slice(None)] * len(shape)
        place[i] = slice(b * size_in, (b + 1) * size_in)
        place[o] = slice(b * size_out, (b + 1) * size_out)
        matrix[tuple(place)] = blocks[b]
    return matrix


class Circulant(NamedTuple):
    """A form that the library does not have: a square matrix whose rows are rotated."""

    first: jax.Array


CIRCULANT = fc.WeightForm(
    shapes=lambda weight, in_ndim: (weight.first.shape, weight.first.shape),
    axes=lambda weight, in_ndim: Circulant("out"),
    dense=lambda weight, in_ndim: jnp.stack(
        [jnp.roll(weight.first, i) for i in range(len(weight.first))]
    ),
)
