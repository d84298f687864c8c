"""The bilinear layer, `y_k = Σ_ij x1_i W_ijk x2_j + b_k`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Num

from fclayers._util.checks import check_array, check_count, check_dtype, describe
from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.initial import draw_matrix, symmetric_uniform
from fclayers._util.jit import jit
from fclayers._util.meshes import on_any_mesh, spec_of
from fclayers._util.reprs import short_repr
from fclayers.kernels.product import add_bias
from fclayers.weights.form import Weight, compute_dtype, dense, layer_shapes, output_spec


class BilinearParams(NamedTuple):
    """The parameters of a bilinear layer.

    Attributes:
        weight: Array of shape `(in1_features, in2_features, out_features)`, or a weight in another
            form.
        bias: Array of shape `(out_features,)`, or `None`.
    """

    weight: Weight
    bias: Inexact[Array, "out"] | None

    def __repr__(self) -> str:
        return short_repr(self)


@public
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
) -> BilinearParams:
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
        `BilinearParams` with a weight of shape `(in1_features, in2_features, out_features)` and a
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
    in1 = check_count("in1_features", in1_features)
    in2 = check_count("in2_features", in2_features)
    out = check_count("out_features", out_features)
    default_init = symmetric_uniform(fan_in=in1)
    weight, drawn_bias = draw_matrix(
        key,
        (in1, in2),
        (out,),
        weight_init=weight_init or default_init,
        bias_init=(bias_init or default_init) if bias else None,
        dtype=dtype,
    )
    return BilinearParams(weight, drawn_bias)


@jit("dtype", "precision")
def apply_bilinear(
    params: BilinearParams,
    x1: Num[Array, "*batch in1"],
    x2: Num[Array, "*batch in2"],
    *,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch out"]:
    """Applies a bilinear layer, `y_k = Σ_ij x1_i W_ijk x2_j + b_k`.

    Args:
        params: The layer, with a weight `(in1, in2, out)` in any form.
        x1: First input.
        x2: Second input, with the batch axes of `x1`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Array of the compute dtype. Products of half precision accumulate in float32.

    Raises:
        TypeError: `params` is not a `BilinearParams`, or an input not an array.
        ValueError: The shapes of weight, bias and inputs do not belong together.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_bilinear(jax.random.key(0), 20, 30, 40)
        >>> fc.apply_bilinear(params, jnp.ones((8, 20)), jnp.ones((8, 30))).shape
        (8, 40)
    """
    if not isinstance(params, BilinearParams):
        raise BadType(f"expected params to be BilinearParams, got {describe(params)}")
    check_array("x1", x1)
    check_array("x2", x2)
    in_shape, out_shape = layer_shapes(params, 2)
    if len(out_shape) != 1:
        raise BadValue(
            f"expected a weight (in1, in2, out) and a bias (out,), got outputs {out_shape}"
        )
    if (*x1.shape[-1:], *x2.shape[-1:]) != in_shape or x1.shape[:-1] != x2.shape[:-1]:
        raise BadValue(
            f"expected x1 (*batch, in1), x2 (*batch, in2) and a weight (in1, in2, out), "
            f"got shapes {x1.shape}, {x2.shape} and {in_shape + out_shape}"
        )
    if dtype is not None:
        check_dtype(dtype)
    else:
        dtype = compute_dtype(x1, x2, params)

    def apply(params: BilinearParams, x1: Array, x2: Array) -> Array:
        y = jnp.einsum(
            "...i,...j,ijk->...k",
            x1.astype(dtype),
            x2.astype(dtype),
            dense(params.weight, 2).astype(dtype),
            precision=precision,
            preferred_element_type=accumulation_dtype(dtype),
        )
        return add_bias(y, params.bias, dtype)

    def sharding() -> tuple[object, ...]:
        return *spec_of(x1)[:-1], *output_spec(params.weight, 2)

    return on_any_mesh(apply, sharding, params, x1, x2)
