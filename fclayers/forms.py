"""The forms of a fully connected layer: their parameters, and what each of them multiplies by.

Every form is a sum of products of some features and a matrix that ends in the outputs; `terms` says
which. `apply_linear` adds them up, `linear_cross_entropy` takes some columns of each at a time.
"""

from math import prod
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Int8

from fclayers._checks import check_array, check_axes, check_dtype, describe
from fclayers._matrix_product import matrix_product
from fclayers._mesh import spec_of
from fclayers._quantized_product import dequantized, quantized_product

Shape = tuple[int, ...]


class LinearParams(NamedTuple):
    """The parameters of a fully connected layer.

    Attributes:
        weight: Array of shape `(*in_features, *out_features)`.
        bias: Array of shape `(*out_features)`, or `None`.
    """

    weight: Inexact[Array, "*in_and_out"]
    bias: Inexact[Array, "*out"] | None


class LowRankParams(NamedTuple):
    """A layer whose weight is the product of two narrow ones; made by `low_rank`.

    Attributes:
        down: Array of shape `(*in_features, rank)`.
        up: Array of shape `(rank, *out_features)`.
        bias: Array of shape `(*out_features)`, or `None`.
    """

    down: Inexact[Array, "*in rank"]
    up: Inexact[Array, "rank *out"]
    bias: Inexact[Array, "*out"] | None


class QuantizedParams(NamedTuple):
    """A layer in 8-bit integers, `weight · scale`; made by `quantize`.

    Attributes:
        weight: int8 array of shape `(*in_features, *out_features)`, from -127 to 127.
        scale: Array of shape `(blocks, *out_features)`: one number for every output and for every
            block of consecutive inputs (of all inputs, flattened, if `blocks` is 1).
        bias: Array of shape `(*out_features)`, or `None`.
    """

    weight: Int8[Array, "*in_and_out"]
    scale: Inexact[Array, "blocks *out"]
    bias: Inexact[Array, "*out"] | None


class LoraParams(NamedTuple):
    """A layer with an adapter beside it, `y = base(x) + scale · x down up`; made by `add_lora`.

    Attributes:
        base: The layer, in any other form; a convolution after `linear_to_conv`.
        down: Array of shape `(*in_features, rank)`.
        up: Array of shape `(rank, *out_features)`.
        scale: Scalar, `alpha / rank`.
    """

    base: Any
    down: Inexact[Array, "*in rank"]
    up: Inexact[Array, "rank *out"]
    scale: Inexact[Array, ""]


Layer = LinearParams | LowRankParams | LoraParams | QuantizedParams
Matrix = Array | QuantizedParams
Term = tuple[Array, Matrix]


def is_form(node: Any) -> TypeGuard[Layer]:
    """Whether a node of a parameter tree is a fully connected layer."""
    return isinstance(node, (LinearParams, LowRankParams, LoraParams, QuantizedParams))


def bias_of(layer: Any) -> Any:
    """The bias, which a layer with an adapter has in its base."""
    return bias_of(layer.base) if isinstance(layer, LoraParams) else layer.bias


def rows_of_features(
    function: str, layer: Any, x: Any, axis: int | tuple[int, ...], dtype: DTypeLike | None
) -> tuple[Array, tuple[Shape, Shape], DTypeLike]:
    """Checks the input of a layer and moves its features to the end.

    Returns the rows `(*batch, inputs)` in the compute dtype, the shapes of the layer's inputs and
    outputs, and the dtype.
    """
    axes, shapes, dtype = check_input(function, layer, x, axis, dtype)
    kept = [a for a in range(x.ndim) if a not in axes]
    # A dot over several axes makes XLA copy the weight, transposed, in the backward pass; as a
    # matrix it is read in place, and reshaping it moves nothing.
    rows = x.astype(dtype).transpose(*kept, *axes)
    return rows.reshape(*(x.shape[a] for a in kept), prod(shapes[0])), shapes, dtype


def check_input(
    function: str, layer: Any, x: Any, axis: int | tuple[int, ...], dtype: DTypeLike | None
) -> tuple[list[int], tuple[Shape, Shape], DTypeLike]:
    """Returns the axes of the features, the shapes of inputs and outputs, the compute dtype."""
    if not is_form(layer):
        check_layer(function, layer)
    check_array(function, "x", x)
    axes = check_axes(function, axis, x.shape)
    features = tuple(x.shape[a] for a in axes)
    in_shape, out_shape = check_layer(function, layer, len(axes))
    if features != in_shape:
        raise ValueError(
            f"{function}: x of shape {x.shape} has features {features} along axis={axis}, "
            f"but the weight of shape {in_shape + out_shape} takes {in_shape}"
        )
    if dtype is not None:
        check_dtype(function, dtype)
    else:
        dtype = jnp.result_type(x, *(a for a in jax.tree.leaves(layer) if a.dtype != jnp.int8))
    return axes, (in_shape, out_shape), dtype


def terms(
    layer: Layer,
    x: Array,
    shapes: tuple[Shape, Shape],
    dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> tuple[Term, ...]:
    """The pairs of features `(*batch, n)` and matrices `(n, outputs)` whose products sum to x W."""
    fan_in, fan_out = map(prod, shapes)

    def narrow(down: Array) -> Array:
        down = down.astype(dtype).reshape(fan_in, down.shape[-1])
        return matrix_product(x, down, precision).astype(dtype)

    match layer:
        case LinearParams(weight, _):
            return ((x, weight.astype(dtype).reshape(fan_in, fan_out)),)
        case QuantizedParams(weight, scale, _):
            scale = scale.reshape(len(scale), fan_out)
            return ((x, QuantizedParams(weight.reshape(fan_in, fan_out), scale, None)),)
        case LowRankParams(down, up, _):
            return ((narrow(down), up.astype(dtype).reshape(len(up), fan_out)),)
        case LoraParams(base, down, up, scale):
            features = scale.astype(dtype) * narrow(down)
            adapter = (features, up.astype(dtype).reshape(len(up), fan_out))
            return (*terms(base, x, shapes, dtype, precision), adapter)


def product(term: Term, precision: lax.PrecisionLike) -> Array:
    """Features times matrix, for half precision in float32."""
    features, matrix = term
    if isinstance(matrix, QuantizedParams):
        return quantized_product(features, matrix.weight, matrix.scale, precision)
    return matrix_product(features, matrix, precision)


def dense(layer: Layer) -> LinearParams:
    """The layer as one weight and a bias."""
    match layer:
        case LinearParams():
            return layer
        case QuantizedParams(weight, scale, bias):
            fan_out = prod(scale.shape[1:])
            matrix = dequantized(
                weight.reshape(-1, fan_out), scale.reshape(len(scale), fan_out), scale.dtype
            )
            return LinearParams(matrix.reshape(weight.shape), bias)
        case LowRankParams(down, up, bias):
            return LinearParams(_outer(down, up).astype(down.dtype), bias)
        case LoraParams(base, down, up, scale):
            weight, bias = dense(base) if is_form(base) else base
            adapter = scale.astype(jnp.result_type(scale, jnp.float32)) * _outer(down, up)
            return LinearParams((weight + adapter).astype(weight.dtype), bias)


def check_layer(
    function: str, layer: Any, in_ndim: int | None = None, name: str = "params"
) -> tuple[Shape, Shape]:
    """Returns the shapes of inputs and outputs; raises unless it is a layer that fits together.

    A plain weight without a bias does not say which of its axes are inputs; `in_ndim` does.
    """
    match layer:
        case LinearParams(weight, bias):
            check_array(function, f"{name}.weight", weight)
            if bias is None:
                split = weight.ndim - 1 if in_ndim is None else in_ndim
                return weight.shape[:split], weight.shape[split:]
            check_array(function, f"{name}.bias", bias)
            split = max(weight.ndim - bias.ndim, 0)
            in_shape, out_shape = weight.shape[:split], weight.shape[split:]
        case QuantizedParams(weight, scale, bias):
            check_array(function, f"{name}.weight", weight)
            check_array(function, f"{name}.scale", scale)
            split = max(weight.ndim - scale.ndim + 1, 0)
            in_shape, out_shape = weight.shape[:split], weight.shape[split:]
            blocks = scale.shape[0] if scale.ndim else 0
            if weight.dtype != jnp.int8 or scale.shape[1:] != out_shape:
                raise ValueError(
                    f"{function}: expected int8 {name}.weight (*in, *out) and {name}.scale "
                    f"(blocks, *out), got {describe(weight)} and {describe(scale)}"
                )
            if blocks == 0 or prod(in_shape) % blocks:
                raise ValueError(
                    f"{function}: {name}.scale has {blocks} blocks, which do not divide the "
                    f"{prod(in_shape)} inputs of the weight of shape {weight.shape}"
                )
        case LowRankParams(down, up, bias) | LoraParams(_, down, up, bias):
            check_array(function, f"{name}.down", down)
            check_array(function, f"{name}.up", up)
            if not down.ndim or not up.ndim or down.shape[-1] != up.shape[0]:
                raise ValueError(
                    f"{function}: expected {name}.down (*in, rank) and {name}.up (rank, *out), "
                    f"got shapes {down.shape} and {up.shape}"
                )
            in_shape, out_shape = down.shape[:-1], up.shape[1:]
            if isinstance(layer, LoraParams):
                base = check_layer(function, layer.base, len(in_shape), f"{name}.base")
                if base != (in_shape, out_shape):
                    raise ValueError(
                        f"{function}: the adapter maps {in_shape} to {out_shape}, "
                        f"but {name}.base maps {base[0]} to {base[1]}"
                    )
                return base
        case _:
            raise TypeError(
                f"{function}: expected {name} to be LinearParams, LowRankParams, LoraParams or "
                f"QuantizedParams, got {describe(layer)}"
            )
    if bias is not None and bias.shape != out_shape:
        raise ValueError(
            f"{function}: the bias must have the last axes of the weight, got a weight of shape "
            f"{in_shape + out_shape} and a bias of shape {bias.shape}"
        )
    return in_shape, out_shape


def output_spec(layer: Any, in_ndim: int) -> tuple[Any, ...]:
    """How the outputs of a layer are sharded on an explicit mesh, one entry per output axis."""
    match layer:
        case LoraParams(base, _, _, _):
            return output_spec(base, in_ndim)
        case LowRankParams(_, up, _):
            return spec_of(up)[1:]
    return spec_of(layer.weight)[in_ndim:]


def _outer(down: Array, up: Array) -> Array:
    """Down · up in full precision, of float32 at least."""
    matrix = matrix_product(down, up.reshape(len(up), -1), lax.Precision.HIGHEST)
    return matrix.reshape(*down.shape[:-1], *up.shape[1:])
