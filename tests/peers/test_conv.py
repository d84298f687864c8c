"""Convolutions, pools and converted heads live against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from strategies import window_cases

import fclayers as fc


def channels_first(x, ndim):
    """`(*batch, *spatial, C)` as PyTorch's `(N, C, *spatial)`."""
    x = x.reshape(-1, *x.shape[-ndim - 1 :])
    return torch.tensor(np.moveaxis(x, -1, 1).astype(np.float32))


def channels_last(y):
    return np.moveaxis(y.numpy(), 1, -1)


@given(window_cases())
def test_conv_and_its_gradients_are_torchs(case):
    ndim = len(case.kernel)
    x = np.asarray(case.x, np.float32).reshape(-1, *case.x.shape[-ndim - 1 :])
    params = fc.init_conv(jax.random.key(0), case.kernel, x.shape[-1], 3)
    padding = case.padding if isinstance(case.padding, int) else 0
    kwargs = {"stride": case.stride, "padding": padding, "dilation": case.dilation}

    conv = getattr(F, f"conv{ndim}d")
    inputs = channels_first(x, ndim).requires_grad_()
    weight = torch.tensor(np.transpose(params.weight, (ndim + 1, ndim, *range(ndim))))
    weight.requires_grad_()
    y = conv(inputs, weight, torch.tensor(np.asarray(params.bias)), **kwargs)
    y.square().sum().backward()

    def loss(params, x):
        return (fc.apply_conv(params, x, **kwargs) ** 2).sum()

    gradients, x_gradient = jax.grad(loss, (0, 1))(params, x)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(
        fc.apply_conv(params, x, **kwargs), channels_last(y.detach()), **tolerance
    )
    np.testing.assert_allclose(x_gradient, channels_last(inputs.grad), **tolerance)
    expected = np.transpose(weight.grad.numpy(), (*range(2, ndim + 2), 1, 0))
    np.testing.assert_allclose(gradients.weight, expected, **tolerance)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pools_and_their_gradients_are_torchs(ceil_mode):
    """Integers in the input make ties, of which PyTorch takes the first."""
    x = np.random.default_rng(0).integers(0, 3, (2, 7, 8, 3)).astype(np.float32)
    padding = ((1, 1), (1, 1 + ceil_mode))
    inputs = channels_first(x, 2).requires_grad_()
    y = F.max_pool2d(inputs, 3, 2, padding=1, ceil_mode=ceil_mode)
    y.square().sum().backward()
    np.testing.assert_array_equal(
        fc.max_pool(x, (3, 3), stride=2, padding=padding),
        channels_last(y.detach()),
    )
    gradient = jax.grad(lambda x: (fc.max_pool(x, (3, 3), stride=2, padding=padding) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, channels_last(inputs.grad), rtol=1e-6)
    for count_include_pad in (False, True):
        expected = F.avg_pool2d(
            channels_first(x, 2), 3, 2, padding=1, count_include_pad=count_include_pad
        )
        y = fc.avg_pool(x, (3, 3), stride=2, padding=1, count_include_pad=count_include_pad)
        np.testing.assert_allclose(y, channels_last(expected), rtol=1e-6)


def test_a_flattened_head_is_torchs_flatten_and_linear():
    feature_map = np.random.default_rng(0).standard_normal((2, 9, 8, 16)).astype(np.float32)
    layer = torch.nn.Linear(16 * 7 * 7, 32)
    params = fc.LinearParams(
        jnp.asarray(layer.weight.detach().numpy().T), jnp.asarray(layer.bias.detach().numpy())
    )
    scores = fc.apply_conv(fc.linear_to_conv(params, (7, 7), order="CHW"), feature_map)
    for i, j in np.ndindex(3, 2):
        window = channels_first(feature_map[:, i : i + 7, j : j + 7], 2)
        expected = layer(window.flatten(1)).detach().numpy()
        np.testing.assert_allclose(scores[:, i, j], expected, atol=1e-5)


def test_default_initializer_has_torchs_bounds():
    layer = torch.nn.Conv2d(6, 8, (3, 5), groups=2)
    params = fc.init_conv(jax.random.key(0), (3, 5), 6, 8, groups=2)
    fan_in = np.prod(layer.weight.shape[1:])
    assert np.prod(params.weight.shape[:-1]) == fan_in
    bound = 1 / np.sqrt(fan_in)
    for ours, theirs in ((params.weight, layer.weight), (params.bias, layer.bias)):
        assert np.abs(ours).max() <= bound
        assert theirs.detach().abs().max() <= bound
