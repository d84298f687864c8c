"""Grouped convolutions in fewer groups: XLA's CPU backend is far slower for many small ones."""

import jax.numpy as jnp
from jaxtyping import Array


def merge_groups(weight: Array, groups: int, channels: int) -> tuple[Array, int]:
    """A kernel `(*kernel, in, groups * out)` of fewer groups, zero between those it merges.

    Groups of the result have at most `channels` inputs and outputs, unless they had more before.
    """
    *kernel, inputs, features = weight.shape
    outputs = features // groups
    most = max(1, channels // max(1, inputs, outputs))
    merged = max(n for n in range(1, min(groups, most) + 1) if groups % n == 0)
    parts = weight.reshape(*kernel, 1, inputs, groups // merged, merged, outputs)
    own = jnp.eye(merged, dtype=bool)[:, None, None, :, None]
    spread = jnp.where(own, parts, 0)
    return spread.reshape(*kernel, merged * inputs, features), groups // merged
