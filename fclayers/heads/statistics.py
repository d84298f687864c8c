"""Statistics of the logits of every row for a loss, and their derivatives, chunk by chunk.

The forward pass keeps a running log-sum-exp; the backward pass recomputes every chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from fclayers._util.dtypes import accumulation_dtype
from fclayers.heads.chunks import Features, Head, for_chunks, logits
from fclayers.kernels.product import matrix_product
from fclayers.weights.form import Weight, axes, dense


class Settings(NamedTuple):
    """Static configuration."""

    chunk_size: int
    sum_logits: bool


class Statistics(NamedTuple):
    """Per row: the log-sum-exp, the label's logit, and the sum of all logits if asked for."""

    lse: Array
    label_logit: Array
    sum_of_logits: Array


Running = tuple[Array, Array, Array, Array]
Residuals = tuple[Head, Features, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(settings: Settings, head: Head, features: Features, labels: Array) -> Statistics:
    """The statistics of rows, whose labels may lie outside of the head's classes."""
    return _forward(settings, head, features, labels)[0]


def _forward(
    settings: Settings, head: Head, features: Features, labels: Array
) -> tuple[Statistics, Residuals]:
    rows, dtype = labels.shape[0], _wide(features)

    def add_chunk(carry: Running, columns: Head, start: int | Array) -> Running:
        largest, total, label_logit, sum_of_logits = carry
        z = logits(columns, features)
        new_largest = jnp.maximum(largest, z.max(1))
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0)
        total = total * jnp.exp(largest - shift) + jnp.exp(z - shift[:, None]).sum(1)
        label_logit += jnp.where(_is_label(labels, z, start), z, 0).sum(1)
        if settings.sum_logits:
            sum_of_logits += z.sum(1)
        return new_largest, total, label_logit, sum_of_logits

    zeros = jnp.zeros(rows, dtype)
    carry = (jnp.full(rows, -jnp.inf, dtype), zeros, zeros, zeros)
    largest, total, label_logit, sum_of_logits = for_chunks(
        head, settings.chunk_size, add_chunk, carry
    )
    lse = jnp.where(jnp.isfinite(largest), largest, 0) + jnp.log(total)
    return Statistics(lse, label_logit, sum_of_logits), (head, features, labels, lse)


def _backward(
    settings: Settings, residuals: Residuals, cotangents: Statistics
) -> tuple[PyTree, Features, None]:
    head, features, labels, lse = residuals
    dtype = _wide(features)
    lse_cotangent, label_cotangent, sum_cotangent = (c[:, None] for c in cotangents)
    # A shard may have only classes with minus infinity as their bias.
    shift = jnp.where(lse == -jnp.inf, 0, lse)[:, None]

    def add_chunk(
        carry: tuple[PyTree, Features], columns: Head, start: int | Array
    ) -> tuple[PyTree, Features]:
        head_cotangent, features_cotangent = carry
        z = logits(columns, features)
        z_cotangent = jnp.exp(z - shift) * lse_cotangent
        z_cotangent += jnp.where(_is_label(labels, z, start), label_cotangent, 0)
        if settings.sum_logits:
            z_cotangent += sum_cotangent
        matrices = [dense(weight, 1).astype(dtype) for weight in columns.weights]
        features_cotangent = tuple(
            total + matrix_product(z_cotangent, matrix.T)
            for total, matrix in zip(features_cotangent, matrices, strict=True)
        )
        columns_cotangent = Head(
            tuple(
                _pull_back(weight, matrix_product(f.astype(dtype).T, z_cotangent))
                for f, weight in zip(features, columns.weights, strict=True)
            ),
            None if columns.bias is None else z_cotangent.sum(0),
        )
        whole = map(partial(_put, start), names, head_cotangent, columns_cotangent)
        return Head(*whole), features_cotangent

    names = (tuple(axes(weight, 1) for weight in head.weights), "out")
    nothing = (
        jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if _is_inexact(a) else None, head),
        tuple(jnp.zeros(f.shape, dtype) for f in features),
    )
    head_cotangent, features_cotangent = for_chunks(head, settings.chunk_size, add_chunk, nothing)
    rounded = tuple(c.astype(f.dtype) for c, f in zip(features_cotangent, features, strict=True))
    return head_cotangent, rounded, None


statistics.defvjp(_forward, _backward)


def _is_label(labels: Array, z: Array, start: int | Array) -> Array:
    hits: Array = labels[:, None] - start == jnp.arange(z.shape[1])
    return hits


def _wide(features: Features) -> DTypeLike:
    return accumulation_dtype(features[0].dtype) or features[0].dtype


def _is_inexact(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _pull_back(weight: Weight, cotangent: Array) -> PyTree:
    """The cotangents of a weight's arrays, `None` for integers."""
    _, pull = jax.vjp(lambda weight: dense(weight, 1).astype(cotangent.dtype), weight)
    (cotangents,) = pull(cotangent)
    return jax.tree.map(lambda a, c: c if _is_inexact(a) else None, weight, cotangents)


def _put(start: int | Array, names: PyTree, whole: PyTree, columns: PyTree) -> PyTree:
    """Writes the cotangents of some columns into those of all."""

    def put(entry: str, array: Array | None, part: Array | None) -> Array | None:
        if array is None or part is None:
            return None
        part = part.astype(array.dtype)
        if "out" not in entry.split():
            return array + part
        axis = entry.split().index("out")
        updated: Array = lax.dynamic_update_slice_in_dim(array, part, start, axis)
        return updated

    return None if whole is None else jax.tree.map(put, names, whole, columns)
