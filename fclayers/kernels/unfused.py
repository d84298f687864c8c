"""Elementwise results that XLA keeps, instead of computing them anew wherever they are read.

Fused into a pool, a sum of products is computed for every element of every window. Worse, each
fusion may round it differently: then a maximum equals none of the elements that it was taken of,
and the gradient, which goes to those that are equal, is lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def unfused(fun: Callable[..., Array], *operands: Array | None) -> Array:
    """`fun(*operands)`, in a branch that is always taken: XLA does not fuse across branches."""
    y = jax.eval_shape(fun, *operands)
    # XLA inlines a branch whose condition is constant, and removes the barrier only after that.
    always = lax.optimization_barrier(jnp.asarray(True))  # type: ignore[no-untyped-call]
    result: Array = lax.cond(always, fun, lambda *_: jnp.zeros_like(y), *operands)
    return result
