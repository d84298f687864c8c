"""Initialization of parameters: PyTorch's defaults, and the same draw in every precision."""

from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array

from fclayers._util.checks import check_dtype, check_key
from fclayers._util.dtypes import accumulation_dtype


def draw(initializer: Initializer, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Calls the initializer; half precision is drawn in float32 and rounded."""
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    return initializer(key, shape, accumulation_dtype(dtype) or dtype).astype(dtype)


def symmetric_uniform(fan_in: int) -> Initializer:
    """Uniform on ±1/√fan_in, real and imaginary parts alike; zero without any inputs."""
    bound = 1 / sqrt(fan_in) if fan_in else 0.0

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            real_dtype = np.zeros((), dtype).real.dtype
            real, imag = jax.random.uniform(key, (2, *shape), real_dtype, -bound, bound)
            return lax.complex(real, imag)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def draw_matrix(
    key: Array,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    *,
    weight_init: Initializer,
    bias_init: Initializer | None,
    dtype: DTypeLike,
) -> tuple[Array, Array | None]:
    """A weight `(*in, *out)`, drawn as a matrix, and a bias `(*out)`."""
    check_key(key)
    check_dtype(dtype)
    fan_in, fan_out = prod(in_shape), prod(out_shape)
    weight_key, bias_key = jax.random.split(key)
    weight = draw(weight_init, weight_key, (fan_in, fan_out), dtype)
    bias = None if bias_init is None else draw(bias_init, bias_key, (fan_out,), dtype)
    return weight.reshape(in_shape + out_shape), None if bias is None else bias.reshape(out_shape)
