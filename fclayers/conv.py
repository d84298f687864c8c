"""Convolutions over one, two or three spatial axes, channels last."""

from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Num

from fclayers._util.checks import (
    check_array,
    check_count,
    check_dtype,
    check_key,
    check_sizes,
    describe,
)
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.initial import draw, symmetric_uniform
from fclayers._util.jit import jit
from fclayers._util.meshes import on_any_mesh, spec_of
from fclayers._util.reprs import short_repr
from fclayers.kernels.windows import Padding, make_geometry
from fclayers.weights.form import (
    Shape,
    Weight,
    compute_dtype,
    convolve,
    layer_shapes,
    output_spec,
)


class ConvParams(NamedTuple):
    """The parameters of a convolution.

    Attributes:
        weight: Array of shape `(*kernel, in_channels // groups, out_channels)`, or a weight in
            another form.
        bias: Array of shape `(out_channels,)`, or `None`.
    """

    weight: Weight
    bias: Inexact[Array, "out"] | None

    def __repr__(self) -> str:
        return short_repr(self)


@public
def init_conv(
    key: Key[Array, ""],
    kernel_shape: tuple[int, ...],
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
        kernel_shape: Size of the kernel, one entry per spatial axis (one to three).
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
        ValueError: `kernel_shape` is not a tuple of one to three integers >= 1, another size is not
            an integer, or `groups` does not divide the channels.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc.init_conv(jax.random.key(0), (3, 3), 16, 32).weight.shape
        (3, 3, 16, 32)

    Source: the defaults documented for
    `torch.nn.Conv2d <https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html>`_.
    """
    check_key(key)
    check_dtype(dtype)
    kernel = check_sizes("kernel_shape", kernel_shape)
    inputs = check_count("in_channels", in_channels)
    outputs = check_count("out_channels", out_channels)
    if check_count("groups", groups) < 1 or inputs % groups or outputs % groups:
        raise BadValue(
            f"groups must divide in_channels and out_channels, "
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
    params: ConvParams,
    x: Num[Array, "*batch_and_spatial in"],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch_and_positions out"]:
    """Applies a convolution; the weight says over how many spatial axes.

    Args:
        params: The layer, with a weight `(*kernel, in // groups, out)` in any form.
        x: Input of shape `(*batch, *spatial, in)`, any number of batch axes.
        stride: Step of the kernel, an integer or one per spatial axis.
        padding: `"VALID"` (none), `"SAME"` (`ceil(size / stride)` outputs), an integer for every
            side, or a tuple with a pair `(before, after)` per spatial axis.
        dilation: Distance of the kernel's taps, an integer or one per spatial axis.
        groups: Number of groups, as in `init_conv`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`. On CPUs, float32 at default precision may be computed with
            fewer products (Winograd), with errors of about 1e-5 of the largest output; `"highest"`
            is the direct convolution.

    Returns:
        Array of shape `(*batch, *positions, out)` and the compute dtype.

    Raises:
        TypeError: `params` is not a `ConvParams`, or `x` is not an array.
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
    *kernel, _, _ = kernel_shape = check_conv(params)
    check_array("x", x)
    geometry = make_geometry(x.shape, tuple(kernel), stride, padding, dilation)
    check_groups(kernel_shape, groups, "x of shape", x.shape)
    if dtype is None:
        dtype = compute_dtype(x, params)
    batch_shape = x.shape[: x.ndim - len(kernel) - 1]

    def apply(params: ConvParams, x: Array) -> Array:
        x = x.reshape(prod(batch_shape), *x.shape[len(batch_shape) :]).astype(dtype)
        bias = None if params.bias is None else params.bias.astype(dtype)
        y = convolve(params.weight, x, geometry, groups, precision, bias)
        return y.reshape(*batch_shape, *y.shape[1:]).astype(dtype)

    def sharding() -> tuple[object, ...]:
        return *spec_of(x)[:-1], *output_spec(params.weight, len(kernel) + 1)

    return on_any_mesh(apply, sharding, params, x)


def check_conv(params: object) -> Shape:
    """Returns the shape of the kernel, `(*kernel, in // groups, out)`."""
    if not isinstance(params, ConvParams):
        hint = "; linear_to_conv converts it" if type(params).__name__ == "LinearParams" else ""
        raise BadType(f"expected params to be ConvParams, got {describe(params)}{hint}")
    in_shape, out_shape = layer_shapes(params)
    if not 2 <= len(in_shape) <= 4 or len(out_shape) != 1:
        raise BadValue(
            f"expected a weight (*kernel, in, out) with one to three spatial axes, "
            f"got shape {in_shape + out_shape}"
        )
    return in_shape + out_shape


def check_groups(kernel_shape: Shape, groups: int, what: str, shape: Shape) -> None:
    """Raises unless the channels of an input of this shape are the kernel's."""
    *_, in_per_group, out_channels = kernel_shape
    if groups < 1 or shape[-1] != in_per_group * groups or out_channels % groups:
        raise BadValue(
            f"with groups={groups} the weight of shape {kernel_shape} takes "
            f"{in_per_group * groups} channels, got {what} {shape}"
        )
