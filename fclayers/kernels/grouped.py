"""Merges small groups of a convolution, of which XLA's CPU backend is slow to run many."""

import jax.numpy as jnp
from jaxtyping import Array


def merged_groups(weight_shape: tuple[int, ...], groups: int, channels: int) -> int:
    """How many groups are left if groups are merged up to `channels` inputs and outputs."""
    *_, inputs, features = weight_shape
    most = max(1, channels // max(1, inputs, features // groups))
    return groups // max(n for n in range(1, min(groups, most) + 1) if groups % n == 0)


def merge_groups(weight: Array, groups: int, fewer: int) -> Array:
    """The kernel of the same convolution in fewer groups: zero between those that are merged.

    From `(*kernel, in, groups * out)` to `(*kernel, groups // fewer * in, groups * out)`.
    """
    *kernel, inputs, features = weight.shape
    merged, outputs = groups // fewer, features // groups
    parts = weight.reshape(*kernel, 1, inputs, fewer, merged, outputs)
    same_group = jnp.eye(merged, dtype=bool)[:, None, None, :, None]
    merged_weight = jnp.where(same_group, parts, 0)
    return merged_weight.reshape(*kernel, merged * inputs, features)
