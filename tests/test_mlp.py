"""The multilayer perceptron against the formula, and its dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.booleans(),
)
def test_is_the_formula(sizes, batch_shape, bias):
    params = fc.init_mlp(jax.random.key(0), sizes, bias=bias)
    x = jax.random.normal(jax.random.key(1), (*batch_shape, sizes[0]))
    expected = np.asarray(x, np.float64)
    for i, (weight, bias_vector) in enumerate(params):
        expected = expected @ np.asarray(weight, np.float64)
        expected = expected if bias_vector is None else expected + np.asarray(bias_vector)
        expected = np.maximum(expected, 0) if i < len(params) - 1 else expected
    np.testing.assert_allclose(fc.apply_mlp(params, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        fc.apply_mlp(params, x, final_activation=jnp.tanh), np.tanh(expected), rtol=1e-5, atol=1e-5
    )


def test_layers_are_drawn_independently_and_like_init_linear():
    params = fc.init_mlp(jax.random.key(0), [50, 50, 50], dtype=jnp.bfloat16)
    first, second = (np.asarray(layer.weight, np.float32).ravel() for layer in params)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(params))
    zeros = fc.init_mlp(jax.random.key(0), [3, 2], weight_init=jax.nn.initializers.zeros)
    np.testing.assert_array_equal(zeros[0].weight, 0)


def test_initializes_and_applies_under_jit_grad_and_vmap():
    @jax.jit
    def loss(params, x):
        return (fc.apply_mlp(params, x, activation=jnp.tanh) ** 2).sum()

    params = jax.jit(lambda key: fc.init_mlp(key, [3, 4, 2]))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    whole = jax.grad(loss)(params, x)
    samples = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    chex.assert_trees_all_close(whole, jax.tree.map(lambda g: g.sum(0), samples), rtol=1e-4)


def identity_mlp(size):
    layer = fc.LinearParams(jnp.eye(size), None)
    return (layer, layer)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_scales_the_rest(rate):
    ones = jnp.ones((20, 1000))
    y = fc.apply_mlp(identity_mlp(1000), ones, dropout_rate=rate, key=jax.random.key(0))
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)
    spread = 4 * np.sqrt(rate * (1 - rate) / y.size)
    assert abs(counts[0] / y.size - rate) < spread


def test_dropout_masks_differ_between_keys_and_layers():
    layer = fc.LinearParams(jnp.eye(200), None)
    ones = jnp.ones(200)

    def apply(layers, seed):
        return fc.apply_mlp(layers, ones, dropout_rate=0.5, key=jax.random.key(seed))

    assert (apply((layer,) * 2, 0) != apply((layer,) * 2, 1)).any()
    np.testing.assert_array_equal(apply((layer,) * 2, 0), apply((layer,) * 2, 0))
    kept_by_both = (apply((layer,) * 3, 0) > 0).mean()
    assert kept_by_both < 0.4


def test_without_dropout_the_key_does_nothing():
    params = fc.init_mlp(jax.random.key(0), [3, 4, 2])
    chex.assert_trees_all_equal(
        fc.apply_mlp(params, jnp.ones(3), key=jax.random.key(0)), fc.apply_mlp(params, jnp.ones(3))
    )


def test_repeated_calls_trace_once():
    traces = []

    def activation(x):
        traces.append(x)
        return jnp.tanh(x)

    for seed in range(3):
        key = jax.random.key(seed)
        fc.apply_mlp(
            fc.init_mlp(key, [3, 4, 2]),
            jnp.full((2, 3), float(seed)),
            activation=activation,
            dropout_rate=0.5,
            key=key,
        )
    assert len(traces) == 1
