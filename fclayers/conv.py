"""Convolutions and pools over one, two or three spatial axes, channels last."""

from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Num

from fclayers._checks import (
    check_array,
    check_count,
    check_dtype,
    check_features,
    check_key,
    describe,
)
from fclayers._convolution import convolve, quantized_convolve
from fclayers._initial import draw, symmetric_uniform
from fclayers._jit import jit
from fclayers._matrix_product import accumulation_dtype, add_bias, matrix_product
from fclayers._mesh import on_any_mesh, spec_of
from fclayers._pooling import Pool, reduce_windows
from fclayers._windows import Geometry, Padding, make_geometry, per_axis, positions
from fclayers.forms import (
    LoraParams,
    LowRankParams,
    QuantizedParams,
    bias_of,
    check_layer,
    output_spec,
)


class ConvParams(NamedTuple):
    """The parameters of a convolution.

    Attributes:
        weight: Array of shape `(*kernel, in_channels // groups, out_channels)`.
        bias: Array of shape `(out_channels,)`, or `None`.
    """

    weight: Inexact[Array, "*kernel in out"]
    bias: Inexact[Array, "out"] | None


ConvLayer = ConvParams | LowRankParams | LoraParams | QuantizedParams


def init_conv(
    key: Key[Array, ""],
    kernel_shape: int | tuple[int, ...],
    in_channels: int,
    out_channels: int,
    *,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ConvParams:
    """Makes the parameters of a convolution, by default as `torch.nn.Conv2d` does.

    Args:
        key: A key from `jax.random.key`.
        kernel_shape: Size of the kernel, one entry per spatial axis (one to three). An integer is
            a kernel with one spatial axis.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        groups: Number of groups, which must divide both numbers of channels; `in_channels` for a
            depthwise convolution.
        bias: Whether the layer has a bias.
        weight_init: A `jax.nn.initializers` initializer, called with the weight's shape. Default:
            uniform on ±1/√fan-in.
        bias_init: The same for the bias, called with `(out_channels,)`.
        dtype: As in `init_linear`.

    Returns:
        `ConvParams` with a weight of shape `(*kernel_shape, in_channels // groups, out_channels)`.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: A size is not an integer, the kernel has no entry or more than three, one below
            1, or `groups` does not divide the channels.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc.init_conv(jax.random.key(0), (3, 3), 16, 32).weight.shape
        (3, 3, 16, 32)

    Source: the defaults documented for
    `torch.nn.Conv2d <https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html>`_.
    """
    name = "init_conv"
    check_key(name, key)
    check_dtype(name, dtype)
    kernel = check_features(name, "kernel_shape", kernel_shape)
    if not 1 <= len(kernel) <= 3 or 0 in kernel:
        raise ValueError(
            f"{name}: kernel_shape must have one to three entries >= 1, got {kernel_shape}"
        )
    inputs = check_count(name, "in_channels", in_channels)
    outputs = check_count(name, "out_channels", out_channels)
    if check_count(name, "groups", groups) < 1 or inputs % groups or outputs % groups:
        raise ValueError(
            f"{name}: groups must divide in_channels and out_channels, "
            f"got groups={groups} for {inputs} and {outputs} channels"
        )
    shape = (*kernel, inputs // groups, outputs)
    default_init = symmetric_uniform(fan_in=prod(shape[:-1]))
    weight_key, bias_key = jax.random.split(key)
    return ConvParams(
        draw(weight_init or default_init, weight_key, shape, dtype),
        draw(bias_init or default_init, bias_key, (outputs,), dtype) if bias else None,
    )


@jit("stride", "padding", "dilation", "groups", "dtype", "precision")
def apply_conv(
    params: ConvLayer,
    x: Num[Array, "*batch_and_spatial in"],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch_and_spatial out"]:
    """Applies a convolution; the weight says over how many spatial axes.

    Args:
        params: The layer, with a weight of shape `(*kernel, in // groups, out)`, or another form of
            it that `linear_to_conv` made.
        x: Input of shape `(*batch, *spatial, in)`, any number of batch axes.
        stride: Step of the kernel, an integer or one per spatial axis.
        padding: `"VALID"` (none), `"SAME"` (`ceil(size / stride)` outputs), an integer for every
            side, or a tuple with a pair `(before, after)` per spatial axis.
        dilation: Distance of the kernel's taps, an integer or one per spatial axis.
        groups: Number of groups, as in `init_conv`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Array of shape `(*batch, *positions, out)` and the compute dtype.

    Raises:
        TypeError: `params` is no convolution, or `x` not an array.
        ValueError: The channels do not belong together, the kernel is larger than the padded map,
            or an argument does not fit the spatial axes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_conv(jax.random.key(0), (3, 3), 3, 64)
        >>> fc.apply_conv(params, jnp.ones((8, 224, 224, 3)), padding=1).shape
        (8, 224, 224, 64)
    """
    name = "apply_conv"
    kernel_shape = _check_params(name, params)
    check_array(name, "x", x)
    *kernel, in_per_group, out_channels = kernel_shape
    geometry = make_geometry(name, x.shape, tuple(kernel), stride, padding, dilation)
    if groups < 1 or x.shape[-1] != in_per_group * groups or out_channels % groups:
        raise ValueError(
            f"{name}: with groups={groups} the weight of shape {kernel_shape} takes "
            f"{in_per_group * groups} channels, got x of shape {x.shape}"
        )
    if dtype is None:
        dtype = jnp.result_type(x, *(a for a in jax.tree.leaves(params) if a.dtype != jnp.int8))
    batch_shape = x.shape[: x.ndim - len(kernel) - 1]

    def apply(params: ConvLayer, x: Array) -> Array:
        x = x.reshape(prod(batch_shape), *x.shape[len(batch_shape) :]).astype(dtype)
        y = _products(params, x, geometry, groups, precision)
        return add_bias(y.reshape(*batch_shape, *y.shape[1:]), bias_of(params), dtype)

    def sharding() -> tuple[Any, ...]:
        return *spec_of(x)[:-1], *output_spec(params, len(kernel_shape) - 1)

    return on_any_mesh(apply, sharding, params, x)


@jit("window", "stride", "padding", "dilation")
def max_pool(
    x: Num[Array, "*batch_and_spatial channels"],
    window: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
) -> Num[Array, "*batch_and_spatial channels"]:
    """Takes the maximum of every window; padding never wins.

    Args:
        x: Input of shape `(*batch, *spatial, channels)`, any number of batch axes.
        window: Size of the window, one entry per spatial axis (one to three). An integer is a
            square over two spatial axes.
        stride: Step of the window. Default: the window, so that windows do not overlap.
        padding: As in `apply_conv`. PyTorch's `ceil_mode` is padding after the last window.
        dilation: Distance of the elements of a window.

    Returns:
        Array of shape `(*batch, *positions, channels)` and the dtype of `x`. The gradient goes to
        the first maximum of a window, as in PyTorch.

    Raises:
        TypeError: `x` is not an array.
        ValueError: The window is larger than the padded map, or an argument does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> fc.max_pool(jnp.ones((8, 28, 28, 16)), (2, 2)).shape
        (8, 14, 14, 16)
    """
    name = "max_pool"
    check_array(name, "x", x)
    geometry = _pool_geometry(name, x, window, stride, padding, dilation)
    return _reduce_windows(x, "max", geometry)


@jit("window", "stride", "padding", "dilation", "count_include_pad")
def avg_pool(
    x: Num[Array, "*batch_and_spatial channels"],
    window: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    count_include_pad: bool = True,
) -> Inexact[Array, "*batch_and_spatial channels"]:
    """Takes the mean of every window.

    Args:
        x: Input of shape `(*batch, *spatial, channels)`, any number of batch axes.
        window: As in `max_pool`.
        stride: As in `max_pool`.
        padding: As in `apply_conv`.
        dilation: As in `max_pool`.
        count_include_pad: Whether padding counts as zeros. Without, a window at the border is the
            mean of what lies inside the map.

    Returns:
        Array of shape `(*batch, *positions, channels)`; integers become floats. Half precision is
        summed in float32.

    Raises:
        TypeError: `x` is not an array.
        ValueError: The window is larger than the padded map, or an argument does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> fc.avg_pool(jnp.ones((8, 28, 28, 16)), (7, 7)).shape
        (8, 4, 4, 16)
    """
    name = "avg_pool"
    check_array(name, "x", x)
    geometry = _pool_geometry(name, x, window, stride, padding, dilation)
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    dtype = x.dtype if inexact else jnp.result_type(x.dtype, jnp.float32)
    x = x.astype(accumulation_dtype(dtype) or dtype)
    total = _reduce_windows(x, "sum", geometry)
    if count_include_pad:
        return (total / prod(geometry.kernel)).astype(dtype)
    spatial = x.shape[x.ndim - len(geometry.kernel) - 1 : -1]
    return (total / _counts(spatial, geometry).astype(total.dtype)).astype(dtype)


def _pool_geometry(
    function: str,
    x: Array,
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None,
    padding: Padding,
    dilation: int | tuple[int, ...],
) -> Geometry:
    kernel = window if isinstance(window, tuple) else (window, window)
    if not 1 <= len(kernel) <= 3:
        raise ValueError(f"{function}: window must have one to three entries, got {window}")
    kernel = per_axis(function, "window", kernel, len(kernel))
    return make_geometry(
        function, x.shape, kernel, kernel if stride is None else stride, padding, dilation
    )


def _reduce_windows(x: Array, kind: Literal["max", "sum"], geometry: Geometry) -> Array:
    """Reduces every window of `(*batch, *spatial, C)`."""
    batch_ndim = x.ndim - len(geometry.kernel) - 1
    ones, no_padding = (1,) * batch_ndim, ((0, 0),) * batch_ndim
    kernel, strides, padding, dilations = geometry
    pool = Pool(
        (*ones, *kernel, 1),
        (*ones, *strides, 1),
        (*no_padding, *padding, (0, 0)),
        (*ones, *dilations, 1),
    )
    return reduce_windows(x, kind, pool)


def _counts(spatial: tuple[int, ...], geometry: Geometry) -> np.ndarray:
    """How many elements of each window lie inside the map: `(*positions, 1)`."""
    counts = np.ones(())
    for size, k, s, pair, d in zip(spatial, *geometry, strict=True):
        (count,) = positions((size,), Geometry((k,), (s,), (pair,), (d,)))
        places = np.arange(count)[:, None] * s + np.arange(k) * d - pair[0]
        counts = counts[..., None] * ((places >= 0) & (places < size)).sum(1)
    return counts[..., None]


def _products(
    params: ConvLayer, x: Array, geometry: Geometry, groups: int, precision: lax.PrecisionLike
) -> Array:
    """The convolution without its bias, for half precision in float32."""

    def narrow(down: Array) -> Array:
        return convolve(x, down.astype(x.dtype), geometry, groups, precision).astype(x.dtype)

    match params:
        case ConvParams(weight, _):
            return convolve(x, weight.astype(x.dtype), geometry, groups, precision)
        case LowRankParams(down, up, _):
            return matrix_product(narrow(down), up.astype(x.dtype), precision)
        case LoraParams(base, down, up, scale):
            adapter = scale.astype(x.dtype) * narrow(down)
            y = _products(base, x, geometry, groups, precision)
            return y + matrix_product(adapter, up.astype(x.dtype), precision)
        case QuantizedParams(weight, scale, _):
            return quantized_convolve(x, weight, scale, geometry, precision)


def _check_params(function: str, params: Any) -> tuple[int, ...]:
    """Returns the shape of the kernel, `(*kernel, in // groups, out)`."""
    match params:
        case ConvParams(weight, bias):
            check_array(function, "params.weight", weight)
            shape = weight.shape
        case LoraParams(base, _, _, _):
            return _check_params(function, base)
        case LowRankParams(_, _, bias) | QuantizedParams(_, _, bias):
            shape = sum(check_layer(function, params), ())
        case _:
            raise TypeError(
                f"{function}: expected params to be ConvParams, or what linear_to_conv made of "
                f"another form, got {describe(params)}"
            )
    if not 3 <= len(shape) <= 5:
        raise ValueError(
            f"{function}: expected a weight (*kernel, in, out) with one to three spatial axes, "
            f"got shape {shape}"
        )
    if bias is not None:
        check_array(function, "params.bias", bias)
        if bias.shape != shape[-1:]:
            raise ValueError(
                f"{function}: the bias must have the weight's output channels, got a weight of "
                f"shape {shape} and a bias of shape {bias.shape}"
            )
    return shape
