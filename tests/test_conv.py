"""Convolutions and pools against windows cut out in a loop, in float64."""

from functools import partial
from math import prod
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from bad_calls import bad_calls
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import window_cases

import fclayers as fc
from fclayers.kernels import convolution
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.windows import make_geometry


@st.composite
def conv_cases(draw):
    groups, in_per_group, out_per_group = draw(st.tuples(*[st.integers(1, 3)] * 3))
    case = draw(window_cases(channels=groups * in_per_group))
    params = fc.init_conv(
        jax.random.key(draw(st.integers(0, 99))),
        case.kernel,
        groups * in_per_group,
        groups * out_per_group,
        groups=groups,
        bias=draw(st.booleans()),
    )
    return case, params, groups


def naive_conv(case, params, groups):
    windows = case.windows()
    weight = np.asarray(params.weight, np.float64)
    ndim = len(case.kernel)
    windows = windows.reshape(*windows.shape[:-1], groups, weight.shape[-2])
    weight = weight.reshape(*weight.shape[:-1], groups, -1)
    taps = "xyz"[:ndim]
    y = np.einsum(f"...{taps}gi,{taps}igo->...go", windows, weight)
    y = y.reshape(*y.shape[:-2], params.weight.shape[-1])
    return y if params.bias is None else y + np.asarray(params.bias, np.float64)


def apply(params, x, case, groups):
    return fc.apply_conv(
        params, x, stride=case.stride, padding=case.padding, dilation=case.dilation, groups=groups
    )


@given(conv_cases())
def test_conv_is_the_sum_over_windows(drawn):
    case, params, groups = drawn
    y = apply(params, case.x.astype(np.float32), case, groups)
    expected = naive_conv(case, params, groups)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("size", [3, 40])
def test_conv_in_other_precisions(dtype, size):
    """A small map is one matrix product of patches on a CPU, a large one XLA's convolution."""
    params = fc.init_conv(jax.random.key(0), (3, 3), 2, 4, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, size, size, 2)), dtype)
    y = fc.apply_conv(params, x, padding=1)
    wide = np.complex128 if dtype == "complex64" else np.float64
    padded = np.pad(np.asarray(x, wide), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = np.einsum("nhwiyx,yxio->nhwo", windows, np.asarray(params.weight, wide))
    expected = expected + np.asarray(params.bias, wide)
    assert y.dtype == dtype
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y, wide), expected, rtol=1.01 * half_ulp, atol=1e-5)


@pytest.mark.parametrize("out_channels", [2, 64])
def test_conv_gradients_are_finite_differences(out_channels):
    """With few outputs it is XLA's convolution, with many the product of patches."""
    with jax.enable_x64(True):
        params = fc.init_conv(jax.random.key(0), (2, 3), 2, out_channels, dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(1), (2, 5, 4, 2), jnp.float64)
        jax.test_util.check_grads(
            lambda params, x: fc.apply_conv(params, x, stride=2, padding=1), (params, x), order=1
        )


@given(conv_cases())
@settings(max_examples=10)
def test_conv_under_vmap_is_the_batch(drawn):
    case, params, groups = drawn
    x = np.stack([case.x, 2 * case.x]).astype(np.float32)
    np.testing.assert_allclose(
        jax.vmap(lambda x: apply(params, x, case, groups))(x),
        apply(params, x, case, groups),
        rtol=1e-5,
        atol=1e-5,
    )


@given(window_cases(), st.booleans())
def test_max_pool_is_the_maximum_of_windows(case, default_stride):
    stride = None if default_stride else case.stride
    case = case._replace(stride=case.kernel if default_stride else case.stride)
    y = fc.max_pool(
        case.x.astype(np.float32),
        case.kernel,
        stride=stride,
        padding=case.padding,
        dilation=case.dilation,
    )
    axes = tuple(range(-len(case.kernel) - 1, -1))
    expected = case._replace(x=case.x.astype(np.float32)).windows(-np.inf).max(axes)
    np.testing.assert_array_equal(y, expected)


@given(window_cases(), st.booleans())
def test_avg_pool_is_the_mean_of_windows(case, count_include_pad):
    y = fc.avg_pool(
        case.x.astype(np.float32),
        case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        count_include_pad=count_include_pad,
    )
    axes = tuple(range(-len(case.kernel) - 1, -1))
    total = case.windows().sum(axes)
    counts = case._replace(x=np.ones_like(case.x)).windows().sum(axes)
    counts = prod(case.kernel) if count_include_pad else counts
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(y, total / counts, rtol=1e-5, atol=1e-5)


def test_max_pool_gives_the_gradient_to_the_first_maximum():
    x = jnp.array([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])[..., None]
    gradient = jax.grad(lambda x: fc.max_pool(x, (3, 3)).sum())(x)
    np.testing.assert_array_equal(gradient[..., 0], [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


def test_dilated_max_pools_have_gradients():
    x = jax.random.normal(jax.random.key(0), (7, 9, 2))
    gradient = jax.grad(lambda x: fc.max_pool(x, (2, 2), stride=1, dilation=2).sum())(x)
    winners, counts = np.unique(fc.max_pool(x, (2, 2), stride=1, dilation=2), return_counts=True)
    expected = np.zeros(x.shape)
    for winner, count in zip(winners, counts, strict=True):
        expected[np.asarray(x) == winner] = count
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 0)])
def test_max_pool_keeps_nan(place):
    assert jnp.isnan(fc.max_pool(jnp.ones((3, 3, 1)).at[place].set(jnp.nan), (3, 3)))


def test_pools_in_other_dtypes():
    integers = jnp.arange(-8, 8, dtype=jnp.int8).reshape(4, 4, 1)
    largest = fc.max_pool(integers, (2, 2), padding=1)
    assert largest.dtype == jnp.int8
    np.testing.assert_array_equal(largest[0, 0], [-8])
    assert fc.avg_pool(integers, (2, 2)).dtype == jnp.float32
    half = jnp.ones((64, 64, 1), jnp.bfloat16)
    np.testing.assert_array_equal(fc.avg_pool(half, (64, 64)), jnp.ones((1, 1, 1), jnp.bfloat16))


def test_init_conv_has_torchs_bounds_and_the_kernels_fans():
    params = fc.init_conv(jax.random.key(0), (5, 4), 60, 90, groups=3)
    assert params.weight.shape == (5, 4, 20, 90)
    for array in params:
        assert np.abs(array).max() <= 1 / np.sqrt(5 * 4 * 20)
    np.testing.assert_allclose(params.weight.var(), 1 / 400 / 3, rtol=0.02)
    he = jax.nn.initializers.he_normal()
    drawn = fc.init_conv(jax.random.key(0), (5, 4), 60, 90, weight_init=he).weight
    np.testing.assert_allclose(drawn.var(), 2 / (5 * 4 * 60), rtol=0.02)


KEY = jax.random.key(0)
CONV = fc.init_conv(KEY, (3, 3), 4, 6)
X = jnp.ones((2, 8, 8, 4))
BAD = {
    "channels": (
        lambda: fc.apply_conv(CONV, X[..., :3]),
        ValueError,
        r"apply_conv: with groups=1 the weight of shape \(3, 3, 4, 6\) takes 4 channels, "
        r"got x of shape \(2, 8, 8, 3\)",
    ),
    "map smaller than the kernel": (
        lambda: fc.apply_conv(CONV, X[:, :2]),
        ValueError,
        r"apply_conv: a window that reaches over \(3, 3\) does not fit into .* \(2, 8\)",
    ),
    "groups that do not divide": (
        lambda: fc.init_conv(KEY, (3, 3), 4, 6, groups=4),
        ValueError,
        "init_conv: groups must divide .* got groups=4 for 4 and 6 channels",
    ),
    "groups of the wrong layer": (
        lambda: fc.apply_conv(CONV, X, groups=2),
        ValueError,
        "apply_conv: with groups=2 .* takes 8 channels",
    ),
    "no spatial axes": (
        lambda: fc.apply_conv(CONV, jnp.ones((8, 4))),
        ValueError,
        r"apply_conv: a window of shape \(3, 3\) needs x of shape \(\*batch",
    ),
    "stride zero": (
        lambda: fc.apply_conv(CONV, X, stride=0),
        ValueError,
        "apply_conv: stride must be an integer >= 1",
    ),
    "three strides": (
        lambda: fc.apply_conv(CONV, X, stride=(1, 1, 1)),
        ValueError,
        r"apply_conv: stride must be .* \(2\), got \(1, 1, 1\)",
    ),
    "unknown padding": (
        lambda: fc.apply_conv(CONV, X, padding="FULL"),
        ValueError,
        "apply_conv: padding must be 'VALID', 'SAME', .* got 'FULL'",
    ),
    "negative padding": (
        lambda: fc.apply_conv(CONV, X, padding=-1),
        ValueError,
        "apply_conv: padding must be .* got -1",
    ),
    "flat padding": (
        lambda: fc.apply_conv(CONV, X, padding=(1, 1)),
        ValueError,
        r"apply_conv: padding must be .* got \(1, 1\)",
    ),
    "a linear layer": (
        lambda: fc.apply_conv(fc.init_linear(KEY, 4, 6), X),
        TypeError,
        "apply_conv: .* ConvParams, got LinearParams; linear_to_conv converts it",
    ),
    "an integer for a kernel": (
        lambda: fc.init_conv(KEY, 3, 4, 6),
        ValueError,
        r"init_conv: kernel_shape must be a tuple .*, such as \(3, 3\), got 3",
    ),
    "an integer for a window": (
        lambda: fc.max_pool(X, 2),
        ValueError,
        r"max_pool: window_shape must be a tuple .*, such as \(3, 3\), got 2",
    ),
    "a window of zero": (
        lambda: fc.avg_pool(X, (2, 0)),
        ValueError,
        r"avg_pool: window_shape must have entries >= 1, got \(2, 0\)",
    ),
    "a bilinear layer": (
        lambda: fc.apply_conv(fc.init_bilinear(KEY, 4, 5, 6), X),
        TypeError,
        "apply_conv: expected params to be ConvParams, got BilinearParams",
    ),
    "kernel of four axes": (
        lambda: fc.init_conv(KEY, (3, 3, 3, 3), 4, 6),
        ValueError,
        "init_conv: kernel_shape must be a tuple with one to three entries",
    ),
    "pool larger than the map": (
        lambda: fc.max_pool(X, (9, 9)),
        ValueError,
        r"max_pool: a window that reaches over \(9, 9\) does not fit",
    ),
    "pool of four axes": (
        lambda: fc.avg_pool(X, (2, 2, 2, 2)),
        ValueError,
        "avg_pool: window_shape must be a tuple with one to three entries",
    ),
}


test_error = bad_calls(BAD)


@pytest.mark.slow
@given(window_cases())
def test_tiles_are_the_convolution(case):
    """Large convolutions run in tiles on CPUs; here, tiles of about a row of a small one."""
    assume(case.x.size > 0)
    ndim = len(case.kernel)
    x = jnp.asarray(case.x.reshape(-1, *case.x.shape[-ndim - 1 :]), jnp.float32)
    params = fc.init_conv(jax.random.key(0), case.kernel, x.shape[-1], 3)
    geometry = make_geometry(x.shape, case.kernel, case.stride, case.padding, case.dilation)

    def in_tiles(params, x):
        with mock.patch.object(convolution, "CROSSOVERS", CROSSOVERS._replace(tile_patches=200)):
            return convolution._convolve_by(
                partial(convolution._in_tiles, geometry=geometry, precision=None),
                partial(convolution._plain, geometry=geometry, groups=1, precision=None),
                x,
                *params,
            )

    def plain(params, x):
        kwargs = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        return fc.apply_conv(params, x, **kwargs)

    np.testing.assert_allclose(in_tiles(params, x), plain(params, x), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda params, x, f=function: (f(params, x) ** 2).sum(), (0, 1))(params, x)
        for function in (in_tiles, plain)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)
