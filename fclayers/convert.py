"""Exact conversions between fully connected layers and convolutions, both ways."""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fclayers._util.checks import check_features, check_sizes
from fclayers._util.errors import BadValue, public
from fclayers._util.trees import is_layer
from fclayers.conv import ConvParams, check_conv, check_groups
from fclayers.kernels.windows import Geometry, Padding, make_geometry, positions
from fclayers.linear import LinearParams, check_linear
from fclayers.weights.blockdiagonal import from_groups
from fclayers.weights.form import dense, layer_shapes, move_inputs


@public
def linear_to_conv(
    params: LinearParams,
    kernel_shape: tuple[int, ...] | None = None,
    *,
    order: str = "HWC",
) -> ConvParams:
    """Converts a fully connected layer to the convolution with the same outputs.

    A layer that follows a feature map becomes a convolution whose kernel is as large as the map; a
    layer that follows another layer becomes a 1×1 convolution. On a larger map the convolution
    gives the layer's outputs for every window.

    Args:
        params: The layer, with a weight in any form, `(in, out)` or with the map's axes in `order`:
            `(height, width, channels, out)` for `"HWC"`.
        kernel_shape: Height and width of the map that the layer sees, as (depth, height, width) in
            three axes and (width,) in one, whatever the order. Not needed by a weight that has the
            map's axes; a matrix without it becomes a 1×1 kernel.
        order: How the layer's input was flattened: a permutation of `"WC"`, `"HWC"` or `"DHWC"`.
            `"CHW"` is what PyTorch's `flatten` gives, `"WHC"` what networks ported from Caffe
            and MATLAB have.

    Returns:
        `ConvParams` with a weight `(*kernel_shape, channels, out)` of the same numbers in the same
        form.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `order` is not such a permutation, the kernel does not divide the weight, or the
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
    letters = "DHWC"[-len(order) :]
    if sorted(order) != sorted(letters) or len(order) < 2:
        raise BadValue(f"order must be a permutation of 'WC', 'HWC' or 'DHWC', got {order!r}")
    check_linear(params)
    in_shape, out_shape = layer_shapes(params)
    if len(out_shape) != 1:
        raise BadValue(f"expected one output axis, got a layer to {out_shape}")
    if len(in_shape) not in (1, len(order)):
        raise BadValue(
            f"expected a weight (in, out), or with one axis for each of {order!r} and "
            f"one for the outputs, got shape {in_shape + out_shape}"
        )
    kernel = None if kernel_shape is None else check_sizes("kernel_shape", kernel_shape)
    one_by_one = len(in_shape) == 1 and (kernel is None or prod(kernel) == 1)
    weight = move_inputs(
        params.weight,
        len(in_shape),
        lambda array: _kernel(array, kernel, order, letters),
        keeps_order=order == letters,
        keeps_last=one_by_one or (len(in_shape) > 1 and order[-1] == "C"),
    )
    return ConvParams(weight, params.bias)


@public
def mlp_to_conv(
    params: Sequence[LinearParams],
    kernel_shape: tuple[int, ...] | None = None,
    *,
    order: str = "HWC",
) -> tuple[ConvParams, ...]:
    """Converts fully connected layers to convolutions, all but the first to 1×1 convolutions.

    Args:
        params: The layers, such as `(fc6, fc7, fc8)`.
        kernel_shape: The first layer's, as in `linear_to_conv`.
        order: The first layer's, as in `linear_to_conv`.

    Returns:
        A tuple of convolutions, one per layer, as `linear_to_conv` gives them.

    Raises:
        TypeError: An entry is not a `LinearParams`.
        ValueError: As in `linear_to_conv`, or there is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> head = fc.init_mlp(jax.random.key(0), [7 * 7 * 8, 32, 10])
        >>> [layer.weight.shape for layer in fc.mlp_to_conv(head, (7, 7))]
        [(7, 7, 8, 32), (1, 1, 32, 10)]
    """
    if is_layer(params) or not params:
        raise BadValue("expected a sequence of at least one layer")
    first, *rest = params
    one_by_one = "DHWC"[-len(order) :]
    return (
        linear_to_conv(first, kernel_shape, order=order),
        *(linear_to_conv(layer, order=one_by_one) for layer in rest),
    )


@public
def conv_to_linear(
    params: ConvParams,
    input_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> LinearParams:
    """Converts a convolution on maps of a fixed size to a fully connected layer.

    Args:
        params: The convolution, with a weight in any form, which is materialized.
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
    *kernel, _, out_channels = kernel_shape = check_conv(params)
    weight, bias = dense(params.weight, len(kernel) + 1), params.bias
    shape = check_features("input_shape", input_shape)
    if len(shape) != len(kernel) + 1:
        raise BadValue(
            f"input_shape must be (*spatial, channels) with {len(kernel)} spatial axes for "
            f"a weight of shape {kernel_shape}, got {input_shape}"
        )
    check_groups(kernel_shape, groups, "input_shape", input_shape)
    geometry = make_geometry(shape, tuple(kernel), stride, padding, dilation)
    outputs = positions(shape[:-1], geometry)
    inputs_at, taps_at, outputs_at = _connections(shape[:-1], geometry)
    taps = (weight if groups == 1 else from_groups(weight, groups))[taps_at]
    matrix = jnp.zeros((*shape[:-1], *outputs, shape[-1], out_channels), weight.dtype)
    matrix = matrix.at[(*inputs_at, *outputs_at)].set(taps, unique_indices=True)
    matrix = jnp.moveaxis(matrix, -2, len(kernel))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*outputs, out_channels))
    return LinearParams(matrix, bias)


def _kernel(weight: Array, kernel: tuple[int, ...] | None, order: str, letters: str) -> Array:
    """A weight `(in, n)`, or with the map's axes in `order`, as `(*kernel, channels, n)`."""
    given = weight.shape
    spatial_ndim = len(order) - 1
    if weight.ndim == 2:
        kernel = (1,) * spatial_ndim if kernel is None else kernel
        if len(kernel) != spatial_ndim or not prod(kernel) or weight.shape[0] % prod(kernel):
            raise BadValue(
                f"a kernel of shape {kernel} in order {order!r} does not divide the "
                f"{weight.shape[0]} inputs of the weight of shape {weight.shape}"
            )
        sizes = dict(zip(letters, (*kernel, weight.shape[0] // prod(kernel)), strict=True))
        weight = weight.reshape(*(sizes[letter] for letter in order), weight.shape[1])
    weight = weight.transpose(*(order.index(letter) for letter in letters), -1)
    if kernel is not None and weight.shape[:-2] != kernel:
        raise BadValue(
            f"kernel_shape is {kernel}, but the weight of shape {given} in order "
            f"{order!r} has a kernel of shape {weight.shape[:-2]}"
        )
    return weight


def _connections(spatial: tuple[int, ...], geometry: Geometry) -> list[tuple[np.ndarray, ...]]:
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
