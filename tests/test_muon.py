"""muon_dimension_numbers: layers are orthogonalized as the matrices that they are."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import FORMS
from optax.contrib import MuonDimensionNumbers

import fclayers as fc
from fclayers.weights.form import layer_shapes

KEY = jax.random.key(0)


def muon_updates(params, gradients, numbers):
    optimizer = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers)
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return jax.jit(optimizer.update)(gradients, state, params)[0]


def draw_like(params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    )


def flattened(layer):
    fan_in, fan_out = map(prod, layer_shapes(layer))
    return {"weight": layer.weight.reshape(fan_in, fan_out), "bias": layer.bias.reshape(fan_out)}


LAYERS = {
    "matrix": fc.init_linear(KEY, 12, 8),
    "several axes": fc.init_linear(KEY, (2, 3, 4), (4, 2)),
    "convolution": fc.init_conv(KEY, (3, 2), 4, 6),
    "bilinear": fc.init_bilinear(KEY, 3, 5, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_updates_are_those_of_the_flattened_matrix(name):
    layer = LAYERS[name]
    gradients = draw_like(layer)
    updates = muon_updates(layer, gradients, fc.muon_dimension_numbers(layer))
    matrix = {"weight": MuonDimensionNumbers(), "bias": None}
    expected = muon_updates(flattened(layer), flattened(gradients), matrix)
    actual = flattened(updates)
    for entry in ("weight", "bias"):
        np.testing.assert_allclose(actual[entry], expected[entry], rtol=1e-4, atol=1e-6)
    # Muon's updates have singular values near one, Adam's entries are near one.
    spread = np.linalg.svd(actual["weight"] / 1e-2, compute_uv=False)
    assert (spread > 0.4).all()
    assert (spread < 2.5).all()


@pytest.mark.slow
def test_factors_are_matrices_and_blocks_are_many():
    low = fc.low_rank(fc.init_linear(KEY, (4, 3), 8), rank=2)
    gradients = draw_like(low)
    weight = muon_updates(low, gradients, fc.muon_dimension_numbers(low)).weight
    for actual, gradient, shape in (
        (weight.down, gradients.weight.down, (12, 2)),
        (weight.up, gradients.weight.up, (2, 8)),
    ):
        alone = {"matrix": gradient.reshape(shape)}
        expected = muon_updates(alone, alone, {"matrix": MuonDimensionNumbers()})["matrix"]
        np.testing.assert_allclose(actual.reshape(shape), expected, rtol=1e-4, atol=1e-6)
    blocks = fc.block_diagonal(fc.init_linear(KEY, 6, 8, bias=False), num_blocks=2)
    gradients = draw_like(blocks)
    actual = muon_updates(blocks, gradients, fc.muon_dimension_numbers(blocks)).weight.blocks
    for block, gradient in zip(actual, gradients.weight.blocks, strict=True):
        alone = {"matrix": gradient}
        expected = muon_updates(alone, alone, {"matrix": MuonDimensionNumbers()})["matrix"]
        np.testing.assert_allclose(block, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_biases_scales_integers_and_other_leaves_are_left_out(form):
    layer = FORMS[form](fc.init_linear(KEY, 12, 8))
    params = {"layer": layer, "temperature": jnp.ones(()), "table": jnp.ones((3, 4))}
    numbers = fc.muon_dimension_numbers(params)
    assert numbers["temperature"] is None
    assert numbers["table"] is None
    assert numbers["layer"].bias is None
    entries = jax.tree.leaves(
        numbers, is_leaf=lambda node: node is None or isinstance(node, MuonDimensionNumbers)
    )
    for array, entry in zip(jax.tree.leaves(params), entries, strict=True):
        if entry is not None:
            assert array.ndim >= 2
            assert jnp.issubdtype(array.dtype, jnp.inexact)
