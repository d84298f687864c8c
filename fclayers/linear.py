"""The fully connected layer, `y = x W + b`, and its bilinear form."""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Key, Num

from fclayers._checks import (
    check_array,
    check_axes,
    check_count,
    check_dtype,
    check_features,
    check_key,
    describe,
)
from fclayers._initial import draw, symmetric_uniform
from fclayers._jit import jit
from fclayers._matrix_product import accumulation_dtype, add_bias
from fclayers._mesh import on_any_mesh, spec_of
from fclayers.forms import (
    Layer,
    LinearParams,
    bias_of,
    check_layer,
    output_spec,
    product,
    rows_of_features,
    terms,
)


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
    name = "init_linear"
    in_shape = check_features(name, "in_features", in_features)
    out_shape = check_features(name, "out_features", out_features)
    default_init = symmetric_uniform(fan_in=prod(in_shape))
    return _init(
        name,
        key,
        in_shape,
        out_shape,
        weight_init=weight_init or default_init,
        bias_init=(bias_init or default_init) if bias else None,
        dtype=dtype,
    )


@jit("axis", "dtype", "precision")
def apply_linear(
    params: Layer,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch_and_out"]:
    """Applies a fully connected layer, `y = x W + b`, to any number of batch axes at once.

    Args:
        params: The layer, from `in` to `out` features: `LinearParams` with a weight of shape
            `(*in, *out)`, or another form of it.
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
        TypeError: `params` is no form of the layer, or `x` not an array.
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
    name = "apply_linear"

    def apply(params: Layer, x: Array) -> Array:
        rows, shapes, wide = rows_of_features(name, params, x, axis, dtype)
        pairs = terms(params, rows, shapes, wide, precision)
        y = reduce(jnp.add, [product(pair, precision) for pair in pairs])
        return add_bias(y.reshape(*rows.shape[:-1], *shapes[1]), bias_of(params), wide)

    def sharding() -> list[Any]:
        axes = check_axes(name, axis, x.shape)
        kept = [entry for a, entry in enumerate(spec_of(x)) if a not in axes]
        return [*kept, *output_spec(params, len(axes))]

    return on_any_mesh(apply, sharding, params, x)


def init_bilinear(
    key: Key[Array, ""],
    in1_features: int,
    in2_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LinearParams:
    """Makes the parameters of a bilinear layer, by default as `torch.nn.Bilinear` does.

    Args:
        key: A key from `jax.random.key`.
        in1_features: Number of features of the first input.
        in2_features: Number of features of the second input.
        out_features: Number of output features.
        bias: Whether the layer has a bias.
        weight_init: As in `init_linear`, called with the shape
            `(in1_features * in2_features, out_features)`. Default: uniform on ±1/√in1_features.
        bias_init: As in `init_linear`. Default: uniform on ±1/√in1_features.
        dtype: As in `init_linear`.

    Returns:
        `LinearParams` with a weight of shape `(in1_features, in2_features, out_features)` and a
        bias of shape `(out_features,)` or `None`.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: A feature count is not an integer >= 0, or `dtype` is an integer dtype.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc.init_bilinear(jax.random.key(0), 20, 30, 40).weight.shape
        (20, 30, 40)

    Source: the defaults documented for
    `torch.nn.Bilinear <https://docs.pytorch.org/docs/stable/generated/torch.nn.Bilinear.html>`_.
    """
    name = "init_bilinear"
    in1 = check_count(name, "in1_features", in1_features)
    in2 = check_count(name, "in2_features", in2_features)
    out = check_count(name, "out_features", out_features)
    default_init = symmetric_uniform(fan_in=in1)
    return _init(
        name,
        key,
        (in1, in2),
        (out,),
        weight_init=weight_init or default_init,
        bias_init=(bias_init or default_init) if bias else None,
        dtype=dtype,
    )


@jit("dtype", "precision")
def apply_bilinear(
    params: LinearParams,
    x1: Num[Array, "*batch in1"],
    x2: Num[Array, "*batch in2"],
    *,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch out"]:
    """Applies a bilinear layer, `y_k = Σ_ij x1_i W_ijk x2_j + b_k`.

    Args:
        params: The layer, with a weight of shape `(in1, in2, out)`.
        x1: First input.
        x2: Second input, with the batch axes of `x1`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Array of the compute dtype. Products of half precision accumulate in float32.

    Raises:
        TypeError: `params` is not a `LinearParams`, or an input not an array.
        ValueError: The shapes of weight, bias and inputs do not belong together.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_bilinear(jax.random.key(0), 20, 30, 40)
        >>> fc.apply_bilinear(params, jnp.ones((8, 20)), jnp.ones((8, 30))).shape
        (8, 40)
    """
    name = "apply_bilinear"
    if not isinstance(params, LinearParams):
        raise TypeError(f"{name}: expected params to be LinearParams, got {describe(params)}")
    check_layer(name, params)
    check_array(name, "x1", x1)
    check_array(name, "x2", x2)
    in_shape = x1.shape[-1:] + x2.shape[-1:]
    if params.weight.shape[:-1] != in_shape or x1.shape[:-1] != x2.shape[:-1]:
        raise ValueError(
            f"{name}: expected x1 (*batch, in1), x2 (*batch, in2) and a weight (in1, in2, out), "
            f"got shapes {x1.shape}, {x2.shape} and {params.weight.shape}"
        )
    if params.bias is not None and params.bias.ndim != 1:
        raise ValueError(f"{name}: expected a bias (out,), got shape {params.bias.shape}")
    if dtype is not None:
        check_dtype(name, dtype)
    else:
        dtype = jnp.result_type(x1, x2, *jax.tree.leaves(params))

    def apply(params: LinearParams, x1: Array, x2: Array) -> Array:
        y = jnp.einsum(
            "...i,...j,ijk->...k",
            x1.astype(dtype),
            x2.astype(dtype),
            params.weight.astype(dtype),
            precision=precision,
            preferred_element_type=accumulation_dtype(dtype),
        )
        return add_bias(y, params.bias, dtype)

    def sharding() -> tuple[Any, ...]:
        return *spec_of(x1)[:-1], *output_spec(params, 2)

    return on_any_mesh(apply, sharding, params, x1, x2)


def _init(
    function: str,
    key: Array,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    *,
    weight_init: Initializer,
    bias_init: Initializer | None,
    dtype: DTypeLike,
) -> LinearParams:
    check_key(function, key)
    check_dtype(function, dtype)
    fan_in, fan_out = prod(in_shape), prod(out_shape)
    weight_key, bias_key = jax.random.split(key)
    weight = draw(weight_init, weight_key, (fan_in, fan_out), dtype)
    bias = None if bias_init is None else draw(bias_init, bias_key, (fan_out,), dtype)
    return LinearParams(
        weight.reshape(in_shape + out_shape), None if bias is None else bias.reshape(out_shape)
    )
