"""The product of rows and a matrix, in the precision and the formulation that every layer uses.

XLA's CPU backend multiplies a single row on one thread and writes the weight's gradient twice, the
second time transposed. Cut into blocks along the input, the product runs on all threads and the
gradient is written once. A batch must not be cut: its blocks would each write a whole output. So
`vmap` gets the plain product back, and only the tangent of the weight, which costs the same either
way, stays in two blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Num


def matrix_product(
    x: Num[Array, "*batch in"], weight: Num[Array, "in out"], precision: lax.PrecisionLike = None
) -> Num[Array, "*batch out"]:
    """Returns `x @ weight`, for half precision in float32."""
    dtype = accumulation_dtype(x.dtype)
    single_row = x.size == weight.shape[0] > 0
    if single_row and dtype is None and jax.default_backend() == "cpu":
        return _row_product(x.reshape(-1), weight).reshape(*x.shape[:-1], weight.shape[1])
    return lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )


def accumulation_dtype(dtype: DTypeLike) -> DTypeLike | None:
    """float32 for floats of less than 32 bits, else `None`: the dtype itself."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if half else None


# Below this many weights one thread is as fast as several (measured on two cores).
_MIN_PARALLEL_SIZE = 2**20


@jax.custom_jvp
def _row_product(x: Num[Array, "in"], weight: Num[Array, "in out"]) -> Num[Array, "out"]:
    """Returns `x @ weight`."""
    if weight.size < _MIN_PARALLEL_SIZE:
        return x @ weight
    product: Array = _parallel_product(x, weight)
    return product


@_row_product.defjvp
def _row_product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    return _row_product(x, weight), x_dot @ weight + _block_product(x, weight_dot, blocks=2)


@custom_vmap
def _parallel_product(x: Array, weight: Array) -> Array:
    return _block_product(x, weight, blocks=16)


@_parallel_product.def_vmap
def _plain_product(axis_size: int, in_batched: list[bool], x: Array, weight: Array) -> Any:
    del axis_size
    in_axes = [0 if batched else None for batched in in_batched]
    return jax.vmap(jnp.matmul, in_axes)(x, weight), True


def _block_product(x: Array, weight: Array, blocks: int) -> Array:
    in_features, out_features = weight.shape
    if in_features % blocks:
        return x @ weight
    rows = in_features // blocks
    partial = lax.dot_general(
        x.reshape(blocks, rows),
        weight.reshape(blocks, rows, out_features),
        (((1,), (1,)), ((0,), (0,))),
    )
    return partial.sum(0)
