"""The dtype in which sums are accumulated."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> DTypeLike | None:
    """float32 for floats of less than 32 bits, else `None`: the dtype itself."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if half else None
