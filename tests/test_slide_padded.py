"""slide: networks that pad, and decoders."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_networks import decoder_cases
from hypothesis import assume, given, settings
from padded_layers import FLATTEN, Geometry, pad_axis, reduce_windows
from padded_networks import padded_cases
from slide_networks import Case

import fclayers as fc

# `SLIDE_NETWORKS=2000 python -m pytest tests/test_slide_padded.py -k equation` draws more.
NUM_NETWORKS = int(os.environ.get("SLIDE_NETWORKS", "8"))
NUM_DECODERS = max(3, NUM_NETWORKS // 4)
NUM_EAGER = NUM_GRADIENTS = max(3, NUM_NETWORKS // 20)


def cut_windows(case, image):
    """All windows, one after the other, by NumPy's view of windows on the numbers of the pixels."""
    ndim = len(case.window)
    pixels = np.arange(image.size).reshape(image.shape)
    places = np.lib.stride_tricks.sliding_window_view(pixels, case.window, case.axes)
    places = np.moveaxis(places, case.axes, range(ndim))
    places = places[tuple(slice(None, None, step) for step in case.stride)]
    counts = places.shape[:ndim]
    places = np.moveaxis(places, range(-ndim, 0), [ndim + axis for axis in case.axes])
    return counts, image.reshape(-1)[places.reshape(-1, *places.shape[ndim:])]


def naive(case, params, image):
    counts, windows = cut_windows(case, image)
    outs = jax.vmap(case.fun, (None, 0))(params, windows)
    return jax.tree.map(lambda out: out.reshape(*counts, *out.shape[1:]), outs)


def assert_all_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert np.isfinite(theirs).all()
        scale = np.abs(theirs).max(initial=1.0)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def assert_equation_holds(case, *, transform=jax.jit):
    with jax.enable_x64(True):
        params, image = list(map(jnp.asarray, case.params)), jnp.asarray(case.image)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)
        expected = jax.jit(partial(naive, case))(params, image)
        assert_all_close(transform(sliding)(params, image), expected, 1e-12)


@settings(max_examples=NUM_NETWORKS)
@given(padded_cases())
def test_equation(case):
    assert_equation_holds(case)


@settings(max_examples=NUM_DECODERS)
@given(decoder_cases())
def test_equation_of_decoders(case):
    assert_equation_holds(case)


@pytest.mark.slow
@settings(max_examples=NUM_EAGER)
@given(padded_cases(layers=(1, 4)))
def test_equation_without_jit(case):
    assert_equation_holds(case, transform=lambda sliding: sliding)


@settings(max_examples=max(1, NUM_EAGER // 4))
@given(decoder_cases())
def test_equation_of_decoders_without_jit(case):
    assert_equation_holds(case, transform=lambda sliding: sliding)


def assert_gradients_agree(case):
    # JAX has no reverse mode for these pools.
    assume(not any(name.startswith(("dilated max", "dilated min")) for name in case.layers))
    with jax.enable_x64(True):
        params, image = list(map(jnp.asarray, case.params)), jnp.asarray(case.image)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)

        def loss(function, params, image):
            return sum((out**2).sum() for out in jax.tree.leaves(function(params, image)))

        ours = jax.jit(jax.grad(partial(loss, sliding), (0, 1)))(params, image)
        theirs = jax.jit(jax.grad(partial(loss, partial(naive, case)), (0, 1)))(params, image)
        assert_all_close(ours, theirs, 1e-9)


@pytest.mark.slow
@settings(max_examples=NUM_GRADIENTS)
@given(padded_cases(layers=(1, 4)))
def test_gradients(case):
    assert_gradients_agree(case)


@settings(max_examples=max(1, NUM_GRADIENTS // 4))
@given(decoder_cases())
def test_gradients_of_decoders(case):
    assert_gradients_agree(case)


@pytest.mark.slow
@pytest.mark.parametrize("order", FLATTEN)
@pytest.mark.parametrize("kind", ["max", "avg", "avg by counts"])
def test_pools_in_ceil_mode(kind, order):
    """As in networks from Caffe: 9×12 → 7×10 → 4×5 → 3×4 → 1×2, one pool pads rows, one columns."""
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 2, 4), (2, 2, 4, 4), (8, 5)]
    params = [rng.standard_normal(shape) for shape in shapes]

    def ceil_pool(x, size):
        axes = [pad_axis(n, size, 2, 1, "ceil") for n in x.shape[:-1]]
        geometry = Geometry((size, size), (2, 2), tuple(axes), (1, 1), "ceil")
        return reduce_windows(kind, geometry, whole=False)(None, x), geometry.padding

    def network(params, x):
        first, second, last = params
        x = jax.nn.leaky_relu(fc.apply_conv(fc.ConvParams(first, None), x))
        x, padding = ceil_pool(x, 2)
        assert padding == ((0, 1), (0, 0))
        x = jax.nn.leaky_relu(fc.apply_conv(fc.ConvParams(second, None), x))
        x, padding = ceil_pool(x, 3)
        assert padding == ((0, 0), (0, 1))
        return FLATTEN[order](x) @ last

    for stride in ((1, 3), (4, 2)):
        image = rng.standard_normal((18, 20, 2))
        assert_equation_holds(Case(network, params, (9, 12), stride, (0, 1), image, [kind, order]))


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "shape"), [(32, (256, 256)), (8, (240, 232))])
def test_vgg16(stride, shape):
    """All layers, with an eighth of the channels."""
    keys = iter(jax.random.split(jax.random.key(0), 20))
    he_normal = jax.nn.initializers.he_normal()
    with jax.enable_x64(True):
        drawn = {"weight_init": he_normal, "dtype": jnp.float64}
        blocks, channels = [], 3
        for width, depth in ((8, 2), (16, 2), (32, 3), (64, 3), (64, 3)):
            block = []
            for _ in range(depth):
                block.append(fc.init_conv(next(keys), (3, 3), channels, width, **drawn))
                channels = width
            blocks.append(tuple(block))
        classifier = fc.init_mlp(next(keys), [7 * 7 * channels, 512, 512, 10], **drawn)
        params = fc.models.vgg.Vgg16Params(tuple(blocks), classifier)
        image = jax.random.normal(next(keys), (*shape, 3), jnp.float64)
        network = fc.models.vgg.apply_vgg16
        actual = jax.jit(fc.slide(network, (224, 224), stride=stride))(params, image)
        one = jax.jit(network)
        expected = [
            [one(params, image[i : i + 224, j : j + 224]) for j in range(0, shape[1] - 223, stride)]
            for i in range(0, shape[0] - 223, stride)
        ]
        assert_all_close(actual, np.array(expected), 1e-12)
