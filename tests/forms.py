"""A layer in every form, by name, for tests."""

from math import prod

import jax
import jax.numpy as jnp

import fclayers as fc


def _in_ndim(layer):
    return layer.weight.ndim - (1 if layer.bias is None else layer.bias.ndim)


def _rank(layer):
    split = _in_ndim(layer)
    return min(3, prod(layer.weight.shape[:split]), prod(layer.weight.shape[split:]))


def _in_blocks(layer):
    """One block for every place on the first input axis."""
    return fc.quantize(layer, block_size=prod(layer.weight.shape[1 : _in_ndim(layer)]))


def _adapted(layer):
    """With an adapter that does something."""
    adapted = fc.add_lora(jax.random.key(3), layer, _rank(layer), alpha=2.0)
    up = jnp.cos(jnp.arange(adapted.up.size, dtype=adapted.up.dtype))
    return adapted._replace(up=up.reshape(adapted.up.shape))


# Functions of a `LinearParams`; without a bias, of one with one output axis.
FORMS = {
    "plain": lambda layer: layer,
    "low rank": lambda layer: fc.low_rank(layer, rank=_rank(layer)),
    "adapted": _adapted,
    "int8": fc.quantize,
    "int8 in blocks": _in_blocks,
    "adapted int8": lambda layer: _adapted(layer)._replace(base=fc.quantize(layer)),
}
