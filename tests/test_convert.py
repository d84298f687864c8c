"""Fully connected layers as convolutions and back."""

from math import prod

import chex
import jax
import jax.numpy as jnp
import numpy as np
from bad_calls import bad_calls
from hypothesis import given
from hypothesis import strategies as st
from test_conv import conv_cases

import fclayers as fc

ORDERS = ["WC", "CW", "HWC", "CHW", "WHC", "CWH", "DHWC", "CDHW", "WHDC"]


@st.composite
def heads(draw):
    """A layer after a feature map: its kernel, the flatten order, and a map larger than it."""
    order = draw(st.sampled_from(ORDERS))
    sizes = {letter: draw(st.integers(1, 4)) for letter in order}
    letters = "DHWC"[-len(order) :]
    kernel = tuple(sizes[letter] for letter in letters[:-1])
    params = fc.init_linear(
        jax.random.key(draw(st.integers(0, 99))),
        prod(sizes.values()),
        draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
    )
    larger = tuple(k + draw(st.integers(0, 3)) for k in kernel)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    feature_map = rng.standard_normal((2, *larger, sizes["C"])).astype(np.float32)
    return params, kernel, order, feature_map


def flatten(windows, order):
    """`(*batch, *kernel, C)` flattened in `order`, as the network before the layer did."""
    letters = "DHWC"[-len(order) :]
    batch_ndim = windows.ndim - len(order)
    axes = [batch_ndim + letters.index(letter) for letter in order]
    windows = windows.transpose(*range(batch_ndim), *axes)
    return windows.reshape(*windows.shape[:batch_ndim], -1)


@given(heads())
def test_at_every_position_the_convolution_is_the_layer(head):
    params, kernel, order, feature_map = head
    scores = fc.apply_conv(fc.linear_to_conv(params, kernel, order=order), feature_map)
    positions = tuple(size - k + 1 for size, k in zip(feature_map.shape[1:-1], kernel, strict=True))
    assert scores.shape[1:-1] == positions
    for position in np.ndindex(*positions):
        window = tuple(slice(p, p + k) for p, k in zip(position, kernel, strict=True))
        expected = fc.apply_linear(params, flatten(feature_map[(slice(None), *window)], order))
        np.testing.assert_allclose(scores[(slice(None), *position)], expected, rtol=1e-5, atol=1e-5)


@given(heads())
def test_round_trip_has_the_same_bits(head):
    params, kernel, order, feature_map = head
    conv = fc.linear_to_conv(params, kernel, order=order)
    back = fc.conv_to_linear(conv, (*kernel, feature_map.shape[-1]))
    kernel_axes = range(len(kernel) + 1)
    letters = "DHWC"[-len(order) :]
    weight = jnp.squeeze(back.weight, tuple(range(len(order), 2 * len(order) - 1)))
    weight = weight.transpose(*(letters.index(letter) for letter in order), len(kernel_axes))
    chex.assert_trees_all_equal(weight.reshape(params.weight.shape), params.weight)
    if params.bias is not None:
        chex.assert_trees_all_equal(back.bias.ravel(), params.bias)
    chex.assert_trees_all_equal(
        fc.linear_to_conv(fc.LinearParams(conv.weight, conv.bias), order=letters), conv
    )


@given(conv_cases())
def test_conv_to_linear_is_the_convolution(drawn):
    case, params, groups = drawn
    kwargs = {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": groups,
    }
    x = case.x.astype(np.float32)
    axes = tuple(range(-len(case.kernel) - 1, 0))
    dense = fc.conv_to_linear(params, x.shape[axes[0] :], **kwargs)
    np.testing.assert_allclose(
        fc.apply_linear(dense, x, axis=axes),
        fc.apply_conv(params, x, **kwargs),
        rtol=1e-5,
        atol=1e-5,
    )
    assert set(np.unique(dense.weight)) <= {0, *np.unique(params.weight)}


def test_conv_to_linear_keeps_infinities_in_their_place():
    conv = fc.ConvParams(jnp.full((2, 1, 1), jnp.inf), None)
    dense = fc.conv_to_linear(conv, (3, 1)).weight.reshape(3, 2)
    np.testing.assert_array_equal(dense, [[np.inf, 0], [np.inf, np.inf], [0, np.inf]])


def test_a_head_becomes_convolutions():
    head = fc.init_mlp(jax.random.key(0), [4 * 3 * 5, 16, 7])
    convs = fc.mlp_to_conv(head, (4, 3), order="CHW")
    feature_map = jax.random.normal(jax.random.key(1), (2, 4, 3, 5))
    scores = fc.apply_conv(convs[1], jax.nn.relu(fc.apply_conv(convs[0], feature_map)))
    expected = fc.apply_mlp(head, flatten(np.asarray(feature_map), "CHW"))
    np.testing.assert_allclose(scores[:, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_weight_with_its_spatial_axes_needs_no_kernel_shape():
    channels_first = fc.init_linear(jax.random.key(0), (5, 4, 3), 2)
    conv = fc.linear_to_conv(channels_first, order="CHW")
    np.testing.assert_array_equal(conv.weight, channels_first.weight.transpose(1, 2, 0, 3))


KEY = jax.random.key(0)
FC = fc.init_linear(KEY, 48, 5)
BAD = {
    "kernel does not divide": (
        lambda: fc.linear_to_conv(FC, (5, 5)),
        ValueError,
        r"linear_to_conv: a kernel of shape \(5, 5\) in order 'HWC' does not divide the 48 inputs",
    ),
    "kernel of another rank": (
        lambda: fc.linear_to_conv(FC, (4,)),
        ValueError,
        r"linear_to_conv: a kernel of shape \(4,\) in order 'HWC'",
    ),
    "kernel is not the weight's": (
        lambda: fc.linear_to_conv(fc.init_linear(KEY, (4, 4, 3), 5), (2, 8)),
        ValueError,
        r"linear_to_conv: kernel_shape is \(2, 8\), but .* kernel of shape \(4, 4\)",
    ),
    "order": (
        lambda: fc.linear_to_conv(FC, (4, 4), order="HCC"),
        ValueError,
        "linear_to_conv: order must be a permutation of .* got 'HCC'",
    ),
    "weight of another rank": (
        lambda: fc.linear_to_conv(fc.init_linear(KEY, (4, 12), 5)),
        ValueError,
        r"linear_to_conv: expected a weight \(in, out\), or .* got shape \(4, 12, 5\)",
    ),
    "a convolution": (
        lambda: fc.linear_to_conv(fc.init_conv(KEY, (3, 3), 2, 2)),
        TypeError,
        "linear_to_conv: expected params to be LinearParams, got ConvParams",
    ),
    "one layer for a head": (
        lambda: fc.mlp_to_conv(FC),
        ValueError,
        "mlp_to_conv: expected a sequence of at least one layer",
    ),
    "map smaller than the kernel": (
        lambda: fc.conv_to_linear(fc.init_conv(KEY, (3, 3), 2, 2), (2, 8, 2)),
        ValueError,
        r"conv_to_linear: a window that reaches over \(3, 3\) does not fit .* \(2, 8\)",
    ),
    "map of other channels": (
        lambda: fc.conv_to_linear(fc.init_conv(KEY, (3, 3), 2, 2), (8, 8, 3)),
        ValueError,
        r"conv_to_linear: with groups=1 .* takes 2 channels, got input_shape \(8, 8, 3\)",
    ),
    "map of another rank": (
        lambda: fc.conv_to_linear(fc.init_conv(KEY, (3, 3), 2, 2), (8, 2)),
        ValueError,
        r"conv_to_linear: input_shape must be \(\*spatial, channels\) with 2 spatial axes",
    ),
    "a layer": (
        lambda: fc.conv_to_linear(FC, (4, 4, 3)),
        TypeError,
        "conv_to_linear: expected params to be ConvParams, got LinearParams",
    ),
    "an integer for a kernel": (
        lambda: fc.linear_to_conv(FC, 4, order="WC"),
        ValueError,
        "linear_to_conv: kernel_shape must be a tuple",
    ),
}


test_error = bad_calls(BAD)
