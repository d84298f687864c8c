"""The largest outputs of a fully connected layer, without materializing the logits."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue
from fclayers._util.jit import jit
from fclayers._util.meshes import on_any_mesh, spec_of
from fclayers.heads.chunks import (
    Features,
    Head,
    check_head,
    choose_chunk_size,
    columns_of,
    for_chunks,
    logits,
    make_head,
)
from fclayers.heads.shards import per_shard
from fclayers.linear import LinearParams


@jit("axis", "chunk_size")
def linear_argmax(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
) -> Int[Array, "*batch"]:
    """The class with the largest logit, without materializing the logits.

    Equal to `apply_linear(params, x).argmax(-1)`.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.

    Returns:
        int32 array of shape `(*batch)`; of equal logits the first wins, and NaN wins over all.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `params` has several output axes or no class, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> fc.linear_argmax(params, jnp.ones((8, 64))).shape
        (8,)
    """
    return _top_k(params, x, 1, axis, chunk_size)[1][..., 0]


@jit("k", "axis", "chunk_size")
def linear_top_k(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    k: int,
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
) -> tuple[Num[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The `k` largest logits and their classes, without materializing the logits.

    Equal to `lax.top_k(apply_linear(params, x), k)`.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        k: How many, at most the number of classes.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.

    Returns:
        Logits and int32 classes, each of shape `(*batch, k)`, the largest first; of equal logits
        the first comes first, and NaN before all.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `params` has several output axes, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> logits, classes = fc.linear_top_k(params, jnp.ones((8, 64)), 5)
        >>> logits.shape, classes.shape
        ((8, 5), (8, 5))
    """
    return _top_k(params, x, k, axis, chunk_size)


def _top_k(
    params: LinearParams,
    x: Array,
    k: int,
    axis: int | tuple[int, ...],
    chunk_size: int | None,
) -> tuple[Array, Array]:
    params, classes, batch_shape = check_head(params, x, axis)
    if not 1 <= check_count("k", k) <= classes:
        raise BadValue(f"k must be from 1 to the {classes} classes, got {k}")

    def best_of(shard: int | Array, params: LinearParams, x: Array) -> tuple[Array, Array]:
        head, features = make_head(params, x, axis)
        size = choose_chunk_size(chunk_size, features)
        values, found = _best(head, features, min(k, head.classes), size)
        values, found = values.astype(features[0].dtype), found + shard * head.classes
        shape = *check_head(params, x, axis)[2], values.shape[1]
        return values.reshape(shape), found.reshape(shape)

    def side_by_side(a: Array) -> Array:
        return jnp.moveaxis(a, 0, -2).reshape(*batch_shape, a.shape[0] * a.shape[-1])

    best = per_shard(best_of, params, x, axis)
    spec = [*spec_of(best[0])[1:-1], None]
    values, found = (on_any_mesh(side_by_side, lambda: spec, a) for a in best)
    values, places = lax.top_k(values, k)
    return values, jnp.take_along_axis(found, places, -1)


def _best(head: Head, features: Features, k: int, chunk_size: int) -> tuple[Array, Array]:
    """The `k` largest logits of every row and their classes, each `(rows, k)`."""

    def merge(best: tuple[Array, Array], columns: Head, start: int | Array) -> tuple[Array, Array]:
        z = logits(columns, features)
        values, places = lax.top_k(z, min(k, z.shape[1]))
        values = jnp.concatenate([best[0], values], 1)
        candidates = jnp.concatenate([best[1], places + start], 1)
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(candidates, places, 1)

    first = max(k, min(chunk_size, head.classes))
    values, found = lax.top_k(logits(columns_of(head, 0, first), features), k)
    return for_chunks(head, chunk_size, merge, (values, found), begin=first)
