"""Formulations for CPUs against XLA's own."""

import os
from functools import partial
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

import fclayers as fc
from fclayers.kernels import convolution, shifted, winograd
from fclayers.kernels.convolution import _plain, convolve
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.unrolled import unrolled_convolve
from fclayers.kernels.windows import Geometry


@st.composite
def tiny_convolutions(draw):
    ndim = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    kernel, strides, dilations = per_axis(1, 3), per_axis(1, 2), per_axis(1, 2)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    spatial = per_axis(1, 4)
    padding = tuple(
        (low, max(high, r - n - low))
        for r, n, low, high in zip(reach, spatial, per_axis(0, 3), per_axis(0, 3), strict=True)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x = rng.standard_normal((2, *spatial, inputs))
    weight = rng.standard_normal((*kernel, inputs, outputs))
    return x, weight, Geometry(kernel, strides, padding, dilations)


@given(tiny_convolutions())
def test_tiny_maps_as_one_product(case):
    x, weight, geometry = case
    with jax.enable_x64(True):
        expected = _plain(jnp.asarray(x), jnp.asarray(weight), geometry, 1, None)
        y = unrolled_convolve(jnp.asarray(x), jnp.asarray(weight), geometry, None)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@st.composite
def convolutions(draw, *, strides=2, kernels=7, most=12, groups=1):
    """Maps a few times as large as the kernel, and as many channels as `most` per group."""
    ndim = draw(st.integers(1, 2))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    kernel, dilations, padding = per_axis(1, kernels), per_axis(1, 3), per_axis(0, 2)
    spatial = tuple(
        (k - 1) * d + extra for k, d, extra in zip(kernel, dilations, per_axis(1, 20), strict=True)
    )
    geometry = Geometry(kernel, per_axis(1, strides), tuple((p, 1) for p in padding), dilations)
    groups = draw(st.integers(1, groups))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, outputs = draw(st.integers(1, most)), draw(st.integers(1, most))
    x = rng.standard_normal((draw(st.integers(1, 3)), *spatial, inputs * groups))
    weight = rng.standard_normal((*kernel, inputs, outputs * groups))
    return x, weight, geometry, groups


def check_fewer_products(case, tile):
    x, weight, geometry, _ = case
    with jax.enable_x64(True):
        expected = _plain(jnp.asarray(x), jnp.asarray(weight), geometry, 1, None)
    small = CROSSOVERS._replace(large_patches=0, winograd_tile=tile)
    with mock.patch.object(winograd, "CROSSOVERS", small):
        winograd_convolve = jax.jit(partial(winograd.winograd_convolve, geometry=geometry))
        y = winograd_convolve(jnp.float32(x), jnp.float32(weight))
    assert y.dtype == jnp.float32
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", winograd._LARGEST_BLOCKS)
def test_transforms_of_every_block(kernel):
    rng = np.random.default_rng(0)
    for block in range(1, winograd._LARGEST_BLOCKS[kernel] + 1):
        from_points, of_kernel, to_points = winograd.transforms(block, kernel)
        x, weight = rng.standard_normal(block + kernel - 1), rng.standard_normal(kernel)
        y = from_points @ ((of_kernel @ weight) * (to_points @ x))
        np.testing.assert_allclose(y, np.correlate(x, weight, "valid"), rtol=1e-5, atol=1e-5)


@given(convolutions(strides=1), st.sampled_from([1, 2**14, 2**24]))
@settings(max_examples=8)
def test_fewer_products(case, tile):
    """Tiles of one block, of some blocks or images, and no tiles."""
    check_fewer_products(case, tile)


@pytest.mark.slow
@given(convolutions(strides=1, most=100), st.sampled_from([1, 2**18, 2**24]))
@settings(max_examples=int(os.environ.get("FEWER_PRODUCTS_EXAMPLES", "60")))
def test_fewer_products_with_many_channels(case, tile):
    check_fewer_products(case, tile)


@pytest.mark.slow
@given(convolutions(kernels=3, most=3, groups=4))
@settings(max_examples=10)
def test_sums_of_shifted_inputs(case):
    x, weight, geometry, groups = case
    with jax.enable_x64(True):
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        expected = _plain(x, weight, geometry, groups, None)
        y = shifted.shifted_convolve(x, weight, geometry, groups)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@given(tiny_convolutions())
def test_depthwise_sums_with_borders_apart(case):
    x, _, geometry = case
    weight = np.random.default_rng(0).standard_normal((*geometry.kernel, 1, x.shape[-1]))
    with jax.enable_x64(True):
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        expected = _plain(x, weight, geometry, x.shape[-1], None)
        y = shifted._sums_with_borders_apart(x, weight, geometry, x.shape[-1])
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@given(convolutions(kernels=3, most=3, groups=40))
@settings(max_examples=20)
def test_derivatives_of_groups(case):
    x, weight, geometry, groups = case
    with jax.enable_x64(True):
        x, weight = jnp.asarray(x), jnp.asarray(weight)
        y, pull_back = jax.vjp(lambda *args: convolve(*args, geometry, groups, None), x, weight)
        by_plain = jax.vjp(lambda *args: _plain(*args, geometry, groups, None), x, weight)[1]
        chex.assert_trees_all_close(pull_back(y), by_plain(y), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "padding", "groups", "small"),
    [
        ((2, 14, 14, 8), (3, 3, 1, 8), 1, 8, {}),
        ((1, 40, 40, 1), (3, 3, 1, 4), 1, 1, {}),
        ((1, 28, 28, 32), (3, 3, 32, 32), 1, 1, {}),
        ((2, 6, 5, 5, 5), (3, 3, 3, 5, 4), 1, 1, {"large_patches": 1, "tile_patches": 2**11}),
        ((2, 12, 12, 5), (3, 3, 5, 4), 0, 1, {"large_patches": 1}),
        ((1, 12, 12, 16), (3, 3, 16, 32), 1, 1, {"least_patches": 1}),
        ((2, 9, 9, 40), (3, 3, 20, 8), 1, 2, {}),
        ((2, 9, 9, 5), (1, 1, 5, 4), 0, 1, {}),
    ],
    ids=[
        "depthwise",
        "sums",
        "fewer products",
        "tiles",
        "one more row",
        "patches",
        "groups",
        "1×1",
    ],
)
def test_bias_of_every_formulation(x_shape, weight_shape, padding, groups, small):
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(s) for s in (x_shape, weight_shape, (2, weight_shape[-1])))
    x, weight, biases = map(jnp.float32, arrays)
    ndim = len(weight_shape) - 2
    ones = (1,) * ndim
    geometry = Geometry(weight_shape[:ndim], ones, ((padding, padding),) * ndim, ones)

    def ours(x, weight, bias):
        return convolve(x, weight, geometry, groups, None, bias)

    def plain(x, weight, bias):
        return _plain(x, weight, geometry, groups, None) + bias

    def loss_and_gradients(f, bias):
        loss = lambda *args: (jnp.tanh(f(*args) / 4) ** 2).sum()  # noqa: E731
        return f(x, weight, bias), jax.grad(loss, (0, 1, 2))(x, weight, bias)

    with mock.patch.object(convolution, "CROSSOVERS", CROSSOVERS._replace(**small)):
        y = jax.vmap(partial(loss_and_gradients, ours))(biases)
    expected = jax.vmap(partial(loss_and_gradients, plain))(biases)
    chex.assert_trees_all_close(y, expected, rtol=1e-3, atol=1e-3)


CHOSEN = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def chosen_case(groups=1):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 28, 28, 32 * groups))
    weight = rng.standard_normal((3, 3, 32, 32 * groups))
    assert winograd.winograd_wins((1, 28, 28, 32), (3, 3, 32, 32), CHOSEN)
    return x, weight


def test_fewer_products_only_at_default_precision():
    x, weight = map(jnp.float32, chosen_case())
    params = fc.ConvParams(weight, None)
    apply = partial(fc.apply_conv, params, x, padding=1)
    direct = jax.jit(partial(_plain, geometry=CHOSEN, groups=1, precision="highest"))(x, weight)
    assert not np.array_equal(apply(), direct)
    chex.assert_trees_all_close(apply(), direct, rtol=0, atol=2e-5 * float(jnp.abs(direct).max()))
    np.testing.assert_array_equal(apply(precision="highest"), direct)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_array_equal(apply(), direct)


def test_float64_is_direct():
    with jax.enable_x64(True):
        x, weight = map(jnp.asarray, chosen_case())
        np.testing.assert_allclose(
            convolve(x, weight, CHOSEN, 1, None),
            _plain(x, weight, CHOSEN, 1, None),
            rtol=1e-13,
            atol=1e-11,
        )


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_derivatives_of_fewer_products(groups):
    """First derivatives, forward and reverse, and one of the second order."""
    x, weight = map(jnp.float32, chosen_case(groups))
    tangents = jnp.ones_like(x), jnp.cos(weight)

    def derivatives(function):
        def loss(x, weight):
            return (function(x, weight, CHOSEN, groups, None) ** 2).mean()

        gradient = jax.grad(loss, (0, 1))
        return jax.jvp(loss, (x, weight), tangents), jax.jvp(gradient, (x, weight), tangents)

    ours, expected = (jax.jit(partial(derivatives, function))() for function in (convolve, _plain))
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


TRANSFORMATIONS = {
    "vmap over inputs": lambda f, xs, weights: jax.vmap(f, (0, None))(xs, weights[0]),
    "vmap over kernels": lambda f, xs, weights: jax.vmap(f, (None, 0))(xs[0], weights),
    "vmap over both": lambda f, xs, weights: jax.vmap(f)(xs, weights),
    "map": lambda f, xs, weights: lax.map(lambda x: f(x, weights[0]), xs),
    "scan": lambda f, xs, weights: lax.scan(lambda x, w: (f(x, w) / 16, None), xs[0], weights)[0],
    "gradient of every example": lambda f, xs, weights: jax.vmap(
        jax.grad(lambda weight, x: (f(x, weight) ** 2).mean()), (None, 0)
    )(weights[0], xs),
}


@pytest.mark.slow
@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_fewer_products_in_transformations(name, in_tiles):
    x, weight = map(jnp.float32, chosen_case())
    xs, weights = jnp.stack([x, jnp.sin(x)]), jnp.stack([weight, jnp.cos(weight)])

    def run(convolve):
        f = partial(convolve, geometry=CHOSEN, groups=1, precision=None)
        return jax.jit(partial(TRANSFORMATIONS[name], f))(xs, weights)

    small = CROSSOVERS._replace(large_patches=0, winograd_tile=2**18)
    with mock.patch.object(winograd, "CROSSOVERS", small if in_tiles else CROSSOVERS):
        y = run(convolve)
    expected = run(_plain)
    assert not np.array_equal(y, expected)
    np.testing.assert_allclose(y, expected, rtol=0, atol=4e-5 * np.abs(expected).max())


def test_fewer_products_of_half_precision():
    x, weight = (jnp.bfloat16(array) for array in chosen_case())
    with jax.enable_x64(True):
        expected = _plain(x.astype(jnp.float64), weight.astype(jnp.float64), CHOSEN, 1, None)
    y = convolve(x, weight, CHOSEN, 1, None)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("groups", [1, 2])
def test_no_examples(groups):
    x, weight = map(jnp.float32, chosen_case(groups))

    def loss(weight, x):
        y = convolve(x, weight, CHOSEN, groups, None)
        assert y.shape == (0, *x.shape[1:])
        return y.sum()

    np.testing.assert_array_equal(jax.grad(loss)(weight, x[:0]), np.zeros_like(weight))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("inputs", "outputs", "size"), [(1, 0, 64), (0, 2, 64), (8, 0, 3), (0, 0, 3), (64, 0, 64)]
)
def test_no_channels(inputs, outputs, size, groups):
    x, weight = (
        jnp.ones((2, size, size, inputs * groups)),
        jnp.ones((3, 3, inputs, outputs * groups)),
    )

    def loss(weight, x):
        return convolve(x, weight, CHOSEN, groups, None).sum()

    y = convolve(x, weight, CHOSEN, groups, None)
    np.testing.assert_array_equal(y, np.zeros((2, size, size, outputs * groups)))
    for gradient in jax.grad(loss, (0, 1))(weight, x):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "size"),
    [
        (3, 8, 1, 64),
        (1, 1, 8, 16),
        (32, 32, 1, 28),
        (48, 48, 1, 40),
        (16, 16, 1, 3),
        (20, 64, 4, 12),
    ],
)
def test_linear_in_either_argument(inputs, outputs, groups, size):
    """Sums of shifted inputs, depthwise too, fewer products, patches, a tiny map, and groups."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.standard_normal((1, size, size, inputs * groups)))
    weight = jnp.float32(rng.standard_normal((3, 3, inputs, outputs * groups)))
    conv = partial(convolve, geometry=CHOSEN, groups=groups, precision=None)
    y = conv(x, weight)
    both = [
        (lambda x: conv(x, weight), x),
        (lambda weight: conv(x, weight), weight),
    ]
    for fun, argument in both:
        (ours,) = jax.linear_transpose(fun, argument)(y)
        (theirs,) = jax.vjp(fun, argument)[1](y)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@given(convolutions(most=2, groups=3))
@settings(max_examples=5)
def test_groups_one_by_one(case):
    x, weight, geometry, groups = case
    assume(groups > 1)
    x, weight = jnp.float32(x), jnp.float32(weight)
    split = CROSSOVERS._replace(grouped_terms=0, shifted_terms=0)
    with (
        mock.patch("fclayers.kernels.shifted.CROSSOVERS", split),
        mock.patch("fclayers.kernels.convolution.CROSSOVERS", split),
    ):
        y = convolve(x, weight, geometry, groups, None)
    np.testing.assert_allclose(y, _plain(x, weight, geometry, groups, None), rtol=1e-4, atol=1e-4)


@given(convolutions(strides=1, kernels=4))
@settings(max_examples=5)
def test_products_of_patches(case):
    x, weight, geometry, _ = case
    x, weight = jnp.float32(x), jnp.float32(weight)
    always = CROSSOVERS._replace(shifted_terms=0, least_patches=0, product_features=0)

    def both(convolve):
        y, pull_back = jax.vjp(convolve, x, weight)
        return y, *pull_back(jnp.cos(y))

    expected = both(lambda x, weight: _plain(x, weight, geometry, 1, None))
    with (
        mock.patch("fclayers.kernels.shifted.CROSSOVERS", always),
        mock.patch("fclayers.kernels.convolution.CROSSOVERS", always),
    ):
        actual = both(lambda x, weight: convolve(x, weight, geometry, 1, None))
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_pool_of_tiles():
    """With two rows and a column that belong to no window."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 8, 7, 3), jnp.float64)
        pool = partial(fc.avg_pool, window_shape=(3, 2))
        gradient = jax.grad(lambda x: (pool(x) ** 2).sum())(x)
        expected = np.zeros(x.shape)
        expected[:, :6, :6] = np.repeat(np.repeat(2 * pool(x) / 6, 3, 1), 2, 2)
        np.testing.assert_allclose(gradient, expected, rtol=1e-13, atol=1e-13)
        jax.test_util.check_grads(lambda x: pool(x) ** 2, (x,), order=2)
