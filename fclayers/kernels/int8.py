"""The product of rows and an 8-bit integer matrix.

XLA's CPU backend first converts the whole matrix to floating point in memory, which is slow. A few
rows at a time stay in the caches, so a quarter of the bytes of a float32 matrix are read.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Num

from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.meshes import varying_with
from fclayers.kernels.product import matrix_product

# From this size on, a longer program pays off for one or two rows.
_LARGE = 2**18


def quantized_product(
    x: Num[Array, "*batch in"],
    weight: Int8[Array, "in out"],
    scale: Float[Array, "blocks out"],
    precision: lax.PrecisionLike = None,
) -> Num[Array, "*batch out"]:
    """Returns `x @ (weight * scale)`, for half precision in float32."""
    if not jax.typeof(weight).sharding.mesh.empty:
        return _at_once(x, weight, scale, precision)
    y: Array = lax.platform_dependent(
        x,
        weight,
        scale,
        cpu=partial(_in_tiles, precision=precision),
        default=partial(_at_once, precision=precision),
    )
    return y


def dequantized(
    weight: Int8[Array, "in out"], scale: Float[Array, "blocks out"], dtype: DTypeLike
) -> Num[Array, "in out"]:
    """Returns `weight * scale`, rounded to `dtype` once."""
    inputs, outputs = weight.shape
    wide = accumulation_dtype(dtype) or dtype
    blocks = weight.reshape(len(scale), inputs // len(scale), outputs).astype(wide)
    return (blocks * scale.astype(wide)[:, None]).reshape(inputs, outputs).astype(dtype)


def _at_once(x: Array, weight: Array, scale: Array, precision: lax.PrecisionLike) -> Array:
    if len(scale) > 1:
        return matrix_product(x, dequantized(weight, scale, x.dtype), precision)
    y = matrix_product(x, weight.astype(x.dtype), precision)
    return y * scale[0].astype(y.dtype)


def _in_tiles(x: Array, weight: Array, scale: Array, precision: lax.PrecisionLike) -> Array:
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = _sum_of_tiles(rows, weight, scale, precision)
    return y.reshape(*x.shape[:-1], weight.shape[1])


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _sum_of_tiles(x: Array, weight: Array, scale: Array, precision: lax.PrecisionLike) -> Array:
    inputs, outputs = weight.shape
    block_size = inputs // len(scale)
    rows = x.shape[0]
    # In an export, the number of rows may be symbolic.
    few = isinstance(rows, int) and rows <= 2 and weight.size >= _LARGE
    tile_size = 64 if few else 512
    if len(scale) > 1:
        tile_size = -(-tile_size // block_size) * block_size
    tile_size = min(tile_size, inputs)
    num_tiles, rest = divmod(inputs, tile_size) if inputs else (0, 0)

    def tile_product(start: Any, size: int) -> Array:
        tile = lax.dynamic_slice_in_dim(weight, start, size)
        scales = scale
        if len(scale) > 1:
            scales = lax.dynamic_slice_in_dim(scale, start // block_size, size // block_size)
        part = lax.dynamic_slice_in_dim(x, start, size, 1)
        if few and size <= 128:
            return _sum_of_rows(part, tile, scales)
        return _at_once(part, tile, scales, precision)

    y: Array = jnp.zeros((rows, outputs), accumulation_dtype(x.dtype) or x.dtype)
    y = varying_with((x, weight, scale), y)
    if num_tiles:
        y = lax.fori_loop(0, num_tiles, lambda i, y: y + tile_product(i * tile_size, tile_size), y)
    return y + tile_product(inputs - rest, rest) if rest else y


def _sum_of_rows(x: Array, weight: Array, scale: Array) -> Array:
    """One fused loop for a few rows of x, which does not materialize the tile in floating point."""
    x = x.astype(accumulation_dtype(x.dtype) or x.dtype)
    scale = scale.astype(x.dtype)
    inputs, blocks = len(weight), len(scale)
    y: Array = jnp.zeros((), x.dtype)
    for i in range(inputs):
        row = weight[i].astype(x.dtype)
        y = y + x[:, i, None] * (row if blocks == 1 else row * scale[i * blocks // inputs])
    return y * scale[0] if blocks == 1 else y


@_sum_of_tiles.defjvp
def _sum_of_tiles_jvp(precision: lax.PrecisionLike, primals: Any, tangents: Any) -> Any:
    at_once = partial(_at_once, precision=precision)
    return _sum_of_tiles(*primals, precision), jax.jvp(at_once, primals, tangents)[1]
