"""Iteration over the classes of a head in chunks."""

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue
from fclayers.linear import LinearParams, check_input, rows_of_features
from fclayers.weights.form import Weight, by_columns, multiply, shapes, slice_outputs, terms

Features = tuple[Array, ...]
Carry = TypeVar("Carry")


class Head(NamedTuple):
    """A layer as weights with one input and one output axis, the classes, and a bias."""

    weights: tuple[Weight, ...]
    bias: Array | None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return shapes(self.weights[0], 1)[1][0]


def check_head(
    params: LinearParams, x: Array, axis: int | tuple[int, ...]
) -> tuple[LinearParams, int, tuple[int, ...]]:
    """The layer with a weight that has consecutive columns, the number of classes, the batch."""
    contracted, (in_shape, out_shape), _ = check_input(params, x, axis, None)
    if len(out_shape) != 1:
        raise BadValue(
            f"expected a layer with one output axis, the classes, got outputs of shape {out_shape}"
        )
    params = params._replace(weight=by_columns(params.weight, len(in_shape)))
    batch = tuple(size for a, size in enumerate(x.shape) if a not in contracted)
    return params, out_shape[0], batch


def make_head(params: LinearParams, x: Array, axis: int | tuple[int, ...]) -> tuple[Head, Features]:
    """The head, and the features that its weights multiply, each `(rows, n)`."""
    rows, (in_shape, _), dtype = rows_of_features(params, x, axis, None)
    flat = rows.reshape(prod(rows.shape[:-1]), rows.shape[-1])
    features, weights = zip(*terms(params.weight, flat, len(in_shape), None), strict=True)
    return Head(weights, None if params.bias is None else params.bias.astype(dtype)), features


def choose_chunk_size(chunk_size: int | None, features: Features) -> int:
    """The number of classes per chunk."""
    if chunk_size is None:
        inputs = sum(f.shape[1] for f in features)
        rows = features[0].shape[0]
        at_least = rows if isinstance(rows, int) else 0  # symbolic in an export
        return max(1, inputs, 2**20 // max(1, inputs, at_least))
    if check_count("chunk_size", chunk_size) < 1:
        raise BadValue(f"chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


def for_chunks(
    head: Head,
    size: int,
    body: Callable[[Carry, Head, int | Array], Carry],
    carry: Carry,
    *,
    begin: int = 0,
) -> Carry:
    """Calls `carry = body(carry, columns, start)` with consecutive columns from `begin` on."""
    num_chunks, rest = divmod(head.classes - begin, size)

    def step(i: int | Array, carry: Carry) -> Carry:
        start = begin + i * size
        return body(carry, columns_of(head, start, size), start)

    if num_chunks == 1:
        carry = step(0, carry)
    elif num_chunks > 1:
        carry = lax.fori_loop(0, num_chunks, step, carry)
    start = head.classes - rest
    return body(carry, columns_of(head, start, rest), start) if rest else carry


def columns_of(head: Head, start: int | Array, size: int) -> Head:
    """The head of some consecutive classes."""
    weights = tuple(slice_outputs(weight, start, size) for weight in head.weights)
    if head.bias is None:
        return Head(weights, None)
    return Head(weights, lax.dynamic_slice_in_dim(head.bias, start, size))


def logits(head: Head, features: Features) -> Array:
    """All logits of a head `(rows, classes)`, for half precision in float32."""
    pairs = zip(head.weights, features, strict=True)
    z = reduce(jnp.add, [multiply(weight, f, 1, None) for weight, f in pairs])
    return z if head.bias is None else z + head.bias.astype(z.dtype)
