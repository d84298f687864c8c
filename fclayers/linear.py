"""The fully connected layer, `y = x W + b`."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Num

from fclayers._util.checks import check_array, check_axes, check_dtype, check_features, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.initial import draw_matrix, symmetric_uniform
from fclayers._util.jit import jit
from fclayers._util.meshes import on_any_mesh, spec_of
from fclayers._util.reprs import short_repr
from fclayers.kernels.product import add_bias
from fclayers.weights.form import (
    Shape,
    Weight,
    compute_dtype,
    layer_shapes,
    multiply,
    output_spec,
)


class LinearParams(NamedTuple):
    """The parameters of a fully connected layer.

    Attributes:
        weight: Array of shape `(*in_features, *out_features)`, or a weight in another form.
        bias: Array of shape `(*out_features)`, or `None`.
    """

    weight: Weight
    bias: Inexact[Array, "*out"] | None

    def __repr__(self) -> str:
        return short_repr(self)


@public
def init_linear(
    key: Key[Array, ""],
    in_features: int | Sequence[int],
    out_features: int | Sequence[int],
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LinearParams:
    """Makes the parameters of a fully connected layer, by default as `torch.nn.Linear` does.

    Args:
        key: A key from `jax.random.key`.
        in_features: Number of input features, or one number per feature axis of the input.
        out_features: Number of output features, or one number per feature axis of the output.
        bias: Whether the layer has a bias.
        weight_init: A `jax.nn.initializers` initializer, called with the shape of the flattened
            matrix, `(prod(in_features), prod(out_features))`, so that fan-in and fan-out are the
            layer's. Default: uniform on ±1/√fan-in.
        bias_init: The same for the bias, called with `(prod(out_features),)`. Default: uniform
            on ±1/√fan-in of the weight.
        dtype: Dtype of the parameters, floating-point or complex. Half precision is drawn in
            float32 and rounded, so one key gives the same layer in all three.

    Returns:
        `LinearParams` with a weight of shape `(*in_features, *out_features)` and a bias of shape
        `(*out_features)` or `None`. No features in or out give empty arrays.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: A feature count is not an integer >= 0, or `dtype` is an integer dtype.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), (7, 7, 512), 128)
        >>> params.weight.shape, params.bias.shape
        ((7, 7, 512, 128), (128,))

    Source: the defaults documented for
    `torch.nn.Linear <https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html>`_.
    """
    in_shape = check_features("in_features", in_features)
    out_shape = check_features("out_features", out_features)
    default_init = symmetric_uniform(fan_in=prod(in_shape))
    weight, drawn_bias = draw_matrix(
        key,
        in_shape,
        out_shape,
        weight_init=weight_init or default_init,
        bias_init=(bias_init or default_init) if bias else None,
        dtype=dtype,
    )
    return LinearParams(weight, drawn_bias)


@jit("axis", "dtype", "precision")
def apply_linear(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch_and_out"]:
    """Applies a fully connected layer, `y = x W + b`, to any number of batch axes at once.

    Args:
        params: The layer, from `in` to `out` features, with a weight in any form.
        x: Input. Integers are promoted as JAX does (int32 with float32 gives float32).
        axis: The axis of `x` that holds the features, or one axis per input axis of the layer, in
            the layer's order.
        dtype: Compute dtype, to which parameters and input are cast. Default: JAX's type
            promotion of the three decides.
        precision: As in `jax.lax.dot_general`.

    Returns:
        Array of the compute dtype. The axes of `x` that are not contracted keep their order; the
        output features come last. Products of half precision accumulate in float32. On a mesh with
        explicit axes, the former are sharded as in `x`, the latter as in the layer.

    Raises:
        TypeError: `params` is not a `LinearParams`, or `x` is not an array.
        ValueError: The features of `x` along `axis` are not the layer's, `axis` is out of range
            or names an axis twice, or the arrays of the layer do not belong together.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), (7, 7, 512), 10)
        >>> fc.apply_linear(params, jnp.ones((32, 7, 7, 512)), axis=(-3, -2, -1)).shape
        (32, 10)
    """

    def apply(params: LinearParams, x: Array) -> Array:
        rows, (in_shape, out_shape), compute = rows_of_features(params, x, axis, dtype)
        y = multiply(params.weight, rows, len(in_shape), precision)
        return add_bias(y.reshape(*rows.shape[:-1], *out_shape), params.bias, compute)

    def sharding() -> list[object]:
        axes = check_axes(axis, x.shape)
        kept = [entry for a, entry in enumerate(spec_of(x)) if a not in axes]
        return [*kept, *output_spec(params.weight, len(axes))]

    return on_any_mesh(apply, sharding, params, x)


def rows_of_features(
    params: LinearParams, x: Array, axis: int | tuple[int, ...], dtype: DTypeLike | None
) -> tuple[Array, tuple[Shape, Shape], DTypeLike]:
    """Checks the input of a layer and moves its features to the end.

    Returns the rows `(*batch, fan_in)` in the compute dtype, the shapes of the layer's inputs and
    outputs, and the dtype.
    """
    axes, shapes, dtype = check_input(params, x, axis, dtype)
    kept = [a for a in range(x.ndim) if a not in axes]
    # A dot over several axes makes XLA copy the weight, transposed, in the backward pass; as a
    # matrix it is read in place, and reshaping it moves nothing.
    rows = x.astype(dtype).transpose(*kept, *axes)
    return rows.reshape(*(x.shape[a] for a in kept), prod(shapes[0])), shapes, dtype


def check_input(
    params: LinearParams, x: Array, axis: int | tuple[int, ...], dtype: DTypeLike | None
) -> tuple[list[int], tuple[Shape, Shape], DTypeLike]:
    """Returns the axes of the features, the shapes of inputs and outputs, the compute dtype."""
    check_linear(params)
    check_array("x", x)
    axes = check_axes(axis, x.shape)
    features = tuple(x.shape[a] for a in axes)
    in_shape, out_shape = layer_shapes(params, len(axes))
    if features != in_shape:
        raise BadValue(
            f"x of shape {x.shape} has features {features} along axis={axis}, "
            f"but the weight of shape {in_shape + out_shape} takes {in_shape}"
        )
    if dtype is not None:
        check_dtype(dtype)
    return axes, (in_shape, out_shape), compute_dtype(x, params) if dtype is None else dtype


def check_linear(params: object) -> None:
    """Raises unless it is a fully connected layer; names the function for other layers."""
    if isinstance(params, LinearParams):
        return
    hint = {
        "ConvParams": "; conv_to_linear converts a convolution",
        "BilinearParams": "; apply_bilinear applies a bilinear layer",
    }.get(type(params).__name__, "")
    raise BadType(f"expected params to be LinearParams, got {describe(params)}{hint}")
