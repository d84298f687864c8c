"""How parameters are drawn: PyTorch's default distribution, and one draw for every precision."""

from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array

from fclayers._matrix_product import accumulation_dtype


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
