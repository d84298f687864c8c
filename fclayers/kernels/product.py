"""The product of rows and a matrix, in the precision and the formulation that every layer uses.

XLA's CPU backend writes the weight's gradient for a single row twice, the second time transposed.
As the sum of the products of two halves it is written once. Nothing else is affected: only the
weight's tangent is computed that way, and under `vmap` its gradient is still one product.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Num

from fclayers._util.dtypes import accumulation_dtype

Tangent = Array | SymbolicZero


def matrix_product(
    x: Num[Array, "*batch in"], weight: Num[Array, "in out"], precision: lax.PrecisionLike = None
) -> Num[Array, "*batch out"]:
    """Returns `x @ weight`, for half precision in float32."""
    dtype = accumulation_dtype(x.dtype)

    def product(x: Array, weight: Array) -> Array:
        return lax.dot_general(
            x,
            weight,
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )

    def row_product(x: Array, weight: Array) -> Array:
        return _row_product(x.reshape(-1), weight).reshape(*x.shape[:-1], weight.shape[1])

    single_row = x.size == weight.shape[0] > 0 and dtype is None and precision is None
    if single_row and jax.typeof(weight).sharding.mesh.empty:
        y: Array = lax.platform_dependent(x, weight, cpu=row_product, default=product)
        return y
    return product(x, weight)


def transposed_product(
    x: Num[Array, "*batch in"], weight: Num[Array, "out in"], precision: lax.PrecisionLike = None
) -> Num[Array, "*batch out"]:
    """Returns `x @ weight.T`, for half precision in float32, without a transposed copy."""
    product: Array = lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    return product


def add_bias(y: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    """Adds a bias of the last axes, in the precision of the products, and rounds to `dtype`."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(dtype).astype(y.dtype), y.shape)
    return y.astype(dtype)


@jax.custom_jvp
def _row_product(x: Num[Array, "in"], weight: Num[Array, "in out"]) -> Num[Array, "out"]:
    return x @ weight


@partial(_row_product.defjvp, symbolic_zeros=True)
def _row_product_jvp(
    primals: tuple[Array, Array], tangents: tuple[Tangent, Tangent]
) -> tuple[Array, Array]:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    y = _row_product(x, weight)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        y_dot += x_dot @ weight
    if not isinstance(weight_dot, SymbolicZero):
        y_dot += _product_of_halves(x, weight_dot)
    return y, y_dot


def _product_of_halves(x: Array, weight: Array) -> Array:
    in_features, out_features = weight.shape
    if in_features % 2:
        return x @ weight
    halves = lax.dot_general(
        x.reshape(2, in_features // 2),
        weight.reshape(2, in_features // 2, out_features),
        (((1,), (1,)), ((0,), (0,))),
    )
    return halves.sum(0)
