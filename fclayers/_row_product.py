"""One row times a matrix, formulated for XLA's CPU backend.

XLA multiplies a single row on one thread and writes the weight's gradient twice, the second time
transposed. Cut into blocks along the input, the product runs on all threads and the gradient is
written once. A batch must not be cut: its blocks would each write a whole output. So `vmap` gets
the plain product back, and only the tangent of the weight, which costs the same either way,
stays in two blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

# Below this many weights one thread is as fast as several (measured on two cores).
_MIN_PARALLEL_SIZE = 2**20


@jax.custom_jvp
def row_product(x: Float[Array, "in"], weight: Float[Array, "in out"]) -> Float[Array, "out"]:
    """Returns `x @ weight`."""
    if weight.size < _MIN_PARALLEL_SIZE:
        return x @ weight
    product: Array = _parallel_product(x, weight)
    return product


@row_product.defjvp
def _row_product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    return row_product(x, weight), x_dot @ weight + _block_product(x, weight_dot, blocks=2)


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
