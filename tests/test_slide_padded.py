"""slide: networks that pad, and decoders."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_networks import decoder_cases
from hypothesis import assume, given, settings
from padded_layers import FLATTEN, reduce_windows
from padded_networks import PaddedBuilder, padded_cases
from slide_networks import Case

import fclayers as fc

# `SLIDE_NETWORKS=2000 python -m pytest tests/test_slide_padded.py -k equation` draws more.
NUM_NETWORKS = int(os.environ.get("SLIDE_NETWORKS", "12"))
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


@settings(max_examples=NUM_GRADIENTS)
@given(padded_cases(layers=(1, 4)))
def test_gradients(case):
    assert_gradients_agree(case)


@settings(max_examples=max(1, NUM_GRADIENTS // 4))
@given(decoder_cases())
def test_gradients_of_decoders(case):
    assert_gradients_agree(case)
