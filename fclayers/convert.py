"""Exact conversions between fully connected layers and convolutions, both ways."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fclayers._checks import check_features, describe
from fclayers._windows import Geometry, Padding, make_geometry, positions
from fclayers.conv import ConvLayer, ConvParams
from fclayers.forms import (
    Layer,
    LinearParams,
    LoraParams,
    LowRankParams,
    QuantizedParams,
    check_layer,
    is_form,
)


def linear_to_conv(
    params: Layer,
    kernel_shape: int | tuple[int, ...] | None = None,
    *,
    order: str = "HWC",
) -> ConvLayer:
    """Turns a fully connected layer into the convolution that gives the same outputs.

    A layer that follows a feature map becomes a convolution whose kernel is as large as the map; a
    layer that follows another layer becomes a 1×1 convolution. On a larger map the convolution
    gives the layer's outputs for every window.

    Args:
        params: The layer, in any form. Its weight is `(in, out)`, or still has the map's axes in
            `order`: `(height, width, channels, out)` for `"HWC"`.
        kernel_shape: Height and width of the map that the layer sees, as (depth, height, width) in
            three axes and (width,) in one, whatever the order. Not needed by a weight that has the
            map's axes; a matrix without it becomes a 1×1 kernel.
        order: How the layer's input was flattened: a permutation of `"WC"`, `"HWC"` or `"DHWC"`.
            `"CHW"` is what PyTorch's `flatten` gives, `"WHC"` what networks ported from Caffe
            and MATLAB have.

    Returns:
        `ConvParams` with a weight `(*kernel_shape, channels, out)` that holds the same numbers. Of
        another form, the same form, for `apply_conv` too: `LowRankParams` with a kernel of `rank`
        outputs in `down`, `LoraParams` with a convolution as its base, `QuantizedParams` with an
        int8 kernel.

    Raises:
        TypeError: `params` is no form of the layer.
        ValueError: `order` is no such permutation, the kernel does not divide the weight, or the
            inputs, quantized in blocks, would change their order.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc6 = fc.init_linear(jax.random.key(0), 7 * 7 * 512, 128)
        >>> fc.linear_to_conv(fc6, (7, 7)).weight.shape
        (7, 7, 512, 128)
        >>> fc.linear_to_conv(fc.init_linear(jax.random.key(0), 128, 10)).weight.shape
        (1, 1, 128, 10)

    Source: Long, Shelhamer and Darrell 2015, "Fully Convolutional Networks for Semantic
    Segmentation".
    """
    name = "linear_to_conv"
    letters = "DHWC"[-len(order) :]
    if sorted(order) != sorted(letters) or len(order) < 2:
        raise ValueError(
            f"{name}: order must be a permutation of 'WC', 'HWC' or 'DHWC', got {order!r}"
        )
    _, out_shape = check_layer(name, params)
    if len(out_shape) != 1:
        raise ValueError(f"{name}: expected one output axis, got a layer to {out_shape}")

    def kernel(weight: Array) -> Array:
        return _kernel(name, weight, kernel_shape, order, letters)

    match params:
        case LinearParams(weight, bias):
            return ConvParams(kernel(weight), bias)
        case LowRankParams(down, up, bias):
            return LowRankParams(kernel(down), up, bias)
        case LoraParams(base, down, up, scale):
            conv = linear_to_conv(base, kernel_shape, order=order)
            return LoraParams(conv, kernel(down), up, scale)
        case QuantizedParams(weight, scale, bias):
            if len(scale) > 1 and order != letters:
                raise ValueError(
                    f"{name}: order {order!r} would tear apart the {len(scale)} blocks of inputs "
                    f"that the layer is quantized in; convert it first, or use {letters!r}"
                )
            return QuantizedParams(kernel(weight), scale, bias)


def mlp_to_conv(
    params: Sequence[Layer],
    kernel_shape: int | tuple[int, ...] | None = None,
    *,
    order: str = "HWC",
) -> tuple[ConvLayer, ...]:
    """Turns a head of fully connected layers into convolutions: the first large, the rest 1×1.

    Args:
        params: The layers, such as `(fc6, fc7, fc8)`, each in any form.
        kernel_shape: The first layer's, as in `linear_to_conv`.
        order: The first layer's, as in `linear_to_conv`.

    Returns:
        A tuple of convolutions, one per layer, as `linear_to_conv` gives them.

    Raises:
        TypeError: An entry is no form of the layer.
        ValueError: As `linear_to_conv`, or there is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> head = fc.init_mlp(jax.random.key(0), [7 * 7 * 8, 32, 10])
        >>> [layer.weight.shape for layer in fc.mlp_to_conv(head, (7, 7))]
        [(7, 7, 8, 32), (1, 1, 32, 10)]
    """
    if is_form(params) or not params:
        raise ValueError("mlp_to_conv: expected a sequence of at least one layer")
    first, *rest = params
    one_by_one = "DHWC"[-len(order) :]
    return (
        linear_to_conv(first, kernel_shape, order=order),
        *(linear_to_conv(layer, order=one_by_one) for layer in rest),
    )


def conv_to_linear(
    params: ConvParams,
    input_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> LinearParams:
    """Writes a convolution on maps of one size as the fully connected layer it is.

    Args:
        params: The convolution.
        input_shape: Shape of the map, `(*spatial, channels)`.
        stride: As in `apply_conv`.
        padding: As in `apply_conv`.
        dilation: As in `apply_conv`.
        groups: As in `apply_conv`.

    Returns:
        `LinearParams` with a weight `(*spatial, channels, *positions, out)` and a bias
        `(*positions, out)`; `apply_linear` over all axes of the map equals `apply_conv`. The weight
        holds the kernel's numbers, each at every position, and zeros.

    Raises:
        TypeError: `params` is not a `ConvParams`.
        ValueError: The channels do not belong together, or the kernel is larger than the map.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> conv = fc.init_conv(jax.random.key(0), (3, 3), 2, 4)
        >>> fc.conv_to_linear(conv, (8, 8, 2)).weight.shape
        (8, 8, 2, 6, 6, 4)
    """
    name = "conv_to_linear"
    if not isinstance(params, ConvParams):
        raise TypeError(f"{name}: expected params to be ConvParams, got {describe(params)}")
    weight, bias = params
    shape = check_features(name, "input_shape", input_shape)
    *kernel, in_per_group, out_channels = weight.shape
    if len(shape) != len(kernel) + 1:
        raise ValueError(
            f"{name}: input_shape must be (*spatial, channels) with {len(kernel)} spatial axes for "
            f"a weight of shape {weight.shape}, got {input_shape}"
        )
    if groups < 1 or shape[-1] != in_per_group * groups or out_channels % groups:
        raise ValueError(
            f"{name}: with groups={groups} the weight of shape {weight.shape} takes "
            f"{in_per_group * groups} channels, got input_shape {input_shape}"
        )
    geometry = make_geometry(name, shape, tuple(kernel), stride, padding, dilation)
    outputs = positions(shape[:-1], geometry)
    inputs_at, taps_at, outputs_at = _connections(shape[:-1], geometry)
    blocks = _block_diagonal(weight, groups)[taps_at]
    dense = jnp.zeros((*shape[:-1], *outputs, shape[-1], out_channels), weight.dtype)
    dense = dense.at[(*inputs_at, *outputs_at)].set(blocks, unique_indices=True)
    dense = jnp.moveaxis(dense, -2, len(kernel))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*outputs, out_channels))
    return LinearParams(dense, bias)


def _kernel(
    function: str,
    weight: Array,
    kernel_shape: int | tuple[int, ...] | None,
    order: str,
    letters: str,
) -> Array:
    """A weight `(in, out)`, or with the map's axes in `order`, as `(*kernel, channels, out)`."""
    given = weight.shape
    spatial_ndim = len(order) - 1
    if weight.ndim == 2:
        kernel = (1,) * spatial_ndim
        if kernel_shape is not None:
            kernel = check_features(function, "kernel_shape", kernel_shape)
        if len(kernel) != spatial_ndim or not prod(kernel) or weight.shape[0] % prod(kernel):
            raise ValueError(
                f"{function}: a kernel of shape {kernel} in order {order!r} does not divide the "
                f"{weight.shape[0]} inputs of the weight of shape {weight.shape}"
            )
        sizes = dict(zip(letters, (*kernel, weight.shape[0] // prod(kernel)), strict=True))
        weight = weight.reshape(*(sizes[letter] for letter in order), weight.shape[1])
    elif weight.ndim != spatial_ndim + 2:
        raise ValueError(
            f"{function}: expected a weight (in, out), or with one axis for each of {order!r} and "
            f"one for the outputs, got shape {weight.shape}"
        )
    weight = weight.transpose(*(order.index(letter) for letter in letters), -1)
    if kernel_shape is not None and weight.shape[:-2] != check_features(
        function, "kernel_shape", kernel_shape
    ):
        raise ValueError(
            f"{function}: kernel_shape is {kernel_shape}, but the weight of shape {given} in order "
            f"{order!r} has a kernel of shape {weight.shape[:-2]}"
        )
    return weight


def _connections(spatial: tuple[int, ...], geometry: Geometry) -> Any:
    """Index arrays per spatial axis: input, tap and output of every product that is not padding."""
    counts = positions(spatial, geometry)
    per_axis = []
    for size, count, k, s, pair, d in zip(spatial, counts, *geometry, strict=True):
        tap, output = np.indices((k, count)).reshape(2, -1)
        place = output * s + tap * d - pair[0]
        inside = (place >= 0) & (place < size)
        per_axis.append((place[inside], tap[inside], output[inside]))
    choices = np.indices([len(places) for places, _, _ in per_axis]).reshape(len(spatial), -1)
    return [
        tuple(axis[part][choice] for axis, choice in zip(per_axis, choices, strict=True))
        for part in range(3)
    ]


def _block_diagonal(weight: Array, groups: int) -> Array:
    """The kernel with all input channels, zero where a group does not reach."""
    if groups == 1:
        return weight
    *kernel, in_per_group, out_channels = weight.shape
    split = weight.reshape(*kernel, in_per_group, groups, out_channels // groups)
    full = jnp.zeros((*kernel, groups, in_per_group, groups, out_channels // groups), weight.dtype)
    group = np.arange(groups)
    full = full.at[..., group, :, group, :].set(jnp.moveaxis(split, -2, 0))
    return full.reshape(*kernel, groups * in_per_group, out_channels)
