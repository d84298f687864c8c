"""Cross-entropy of a fully connected layer's outputs, and predictions, without all the logits.

The classes are taken a chunk at a time. The forward pass keeps a running log-sum-exp; the backward
pass computes the logits of a chunk again.
"""

from collections.abc import Callable
from functools import partial, reduce
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from fclayers._checks import check_array, check_count, describe
from fclayers._jit import jit
from fclayers._matrix_product import accumulation_dtype, matrix_product
from fclayers._quantized_product import dequantized
from fclayers.forms import Layer, Matrix, QuantizedParams, bias_of, product, rows_of_features, terms


@jit("axis", "chunk_size", "label_smoothing", "z_loss", "reduction")
def linear_cross_entropy(
    params: Layer,
    x: Num[Array, "*batch_and_in"],
    labels: Int[Array, "*batch"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    where: Num[Array, "*batch"] | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Float[Array, "*batch"] | Float[Array, ""]:
    """Softmax cross-entropy of the logits `apply_linear(params, x)`, which are never all there.

    Equal to `optax.softmax_cross_entropy_with_integer_labels(apply_linear(params, x), labels)`, and
    so are its gradients with respect to `params` and `x`.

    Args:
        params: The layer, in any form, with one output axis: the classes.
        x: Input.
        labels: The classes, from 0. A label that is none of them gives NaN, and NaN gradients,
            unless `where` ignores it.
        axis: As in `apply_linear`.
        chunk_size: Number of classes whose logits are held at a time. Default: so many that they
            take no more memory than `x`, or 4 MB.
        label_smoothing: This part of the probability of the labels, in [0, 1], is spread evenly
            over all classes, as in PyTorch.
        z_loss: Factor of the squared log-sum-exp, which is added to keep the logits from drifting.
        where: Which positions count: booleans, or weights that the losses are multiplied with. What
            has the weight zero has no influence, whatever its label and input.
        reduction: `"none"` for one loss per position; `"sum"`; or `"mean"`, the sum over the sum of
            the weights (0 if that is 0).

    Returns:
        Losses of shape `(*batch)` or a scalar, in the dtype of `apply_linear`'s result, for half
        precision in float32. Differentiable in reverse mode.

    Raises:
        TypeError: `params` is no form of the layer, or the labels are not integers.
        ValueError: `params` has several output axes, `labels` or `where` does not have the shape
            `(*batch)`, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> x, labels = jnp.ones((8, 64)), jnp.arange(8)
        >>> fc.linear_cross_entropy(params, x, labels).shape
        (8,)

    Source: `Wijmans et al. 2024, Cut Your Losses <https://arxiv.org/abs/2411.09009>`_; the z-loss
    is that of `Chowdhery et al. 2022, PaLM <https://arxiv.org/abs/2204.02311>`_, section 5.
    """
    name = "linear_cross_entropy"
    head, features, batch_shape = _make_head(name, params, x, axis)
    chunk_size = _check_chunk_size(name, chunk_size, features)
    check_array(name, "labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {describe(labels)}")
    for argument, value in (("labels", labels), ("where", where)):
        if value is not None and jnp.shape(value) != batch_shape:
            raise ValueError(
                f"{name}: {argument} must have the shape {batch_shape} of the batch, x has shape "
                f"{x.shape} and features along axis={axis}, got {describe(value)}"
            )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{name}: z_loss must be >= 0, got {z_loss}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    rows = labels.ravel()
    if where is not None:
        weights = jnp.asarray(where).ravel()
        counts = weights != 0
        rows = jnp.where(counts, rows, 0)
        features = tuple(jnp.where(counts[:, None], f, 0) for f in features)
    losses = _losses(_Settings(chunk_size, label_smoothing, z_loss), head, features, rows)
    if where is not None:
        losses = jnp.where(counts, losses * weights.astype(losses.dtype), 0)
    if reduction == "none":
        return losses.reshape(batch_shape)
    if reduction == "sum":
        return losses.sum()
    total = weights.astype(losses.dtype).sum() if where is not None else losses.size
    return jnp.where(total == 0, 0, losses.sum() / jnp.where(total == 0, 1, total))


@jit("axis", "chunk_size")
def linear_argmax(
    params: Layer,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
) -> Int[Array, "*batch"]:
    """The class with the largest logit, `apply_linear(params, x).argmax(-1)`, without all logits.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.

    Returns:
        int32 array of shape `(*batch)`; of equal logits the first wins, and NaN wins over all.

    Raises:
        TypeError: `params` is no form of the layer.
        ValueError: `params` has several output axes or no class, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> fc.linear_argmax(params, jnp.ones((8, 64))).shape
        (8,)
    """
    return _top_k("linear_argmax", params, x, 1, axis, chunk_size)[1][..., 0]


@jit("k", "axis", "chunk_size")
def linear_top_k(
    params: Layer,
    x: Num[Array, "*batch_and_in"],
    k: int,
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
) -> tuple[Num[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The `k` largest logits and their classes, `lax.top_k(apply_linear(params, x), k)`.

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
        TypeError: `params` is no form of the layer.
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
    return _top_k("linear_top_k", params, x, k, axis, chunk_size)


class _Head(NamedTuple):
    """The layer as arrays that end in the classes."""

    matrices: tuple[Matrix, ...]
    bias: Array | None


class _Settings(NamedTuple):
    chunk_size: int
    label_smoothing: float
    z_loss: float


Features = tuple[Array, ...]


def _make_head(
    function: str, params: Layer, x: Array, axis: int | tuple[int, ...]
) -> tuple[_Head, Features, tuple[int, ...]]:
    """The head, the features that its matrices multiply as `(rows, n)`, and the batch's shape."""
    rows, shapes, dtype = rows_of_features(function, params, x, axis, None)
    if len(shapes[1]) != 1:
        raise ValueError(
            f"{function}: expected a layer with one output axis, the classes, "
            f"got outputs of shape {shapes[1]}"
        )
    flat = rows.reshape(prod(rows.shape[:-1]), rows.shape[-1])
    features, matrices = zip(*terms(params, flat, shapes, dtype, None), strict=True)
    bias = bias_of(params)
    return _Head(matrices, None if bias is None else bias.astype(dtype)), features, rows.shape[:-1]


def _check_chunk_size(function: str, chunk_size: int | None, features: Features) -> int:
    if chunk_size is None:
        inputs = sum(f.shape[1] for f in features)
        return max(1, inputs, 2**20 // max(1, inputs, len(features[0])))
    if check_count(function, "chunk_size", chunk_size) < 1:
        raise ValueError(f"{function}: chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


def _for_chunks(
    head: _Head, size: int, body: Callable[..., Any], carry: Any, *, begin: int = 0
) -> Any:
    """Calls `carry = body(carry, columns, start)` with consecutive columns from `begin` on."""
    num_chunks, rest = divmod(_classes(head) - begin, size)

    def step(i: Any, carry: Any) -> Any:
        start = begin + i * size
        return body(carry, _columns(head, start, size), start)

    if num_chunks == 1:
        carry = step(0, carry)
    elif num_chunks > 1:
        carry = lax.fori_loop(0, num_chunks, step, carry)
    start = _classes(head) - rest
    return body(carry, _columns(head, start, rest), start) if rest else carry


def _columns(head: _Head, start: Any, size: int) -> _Head:
    columns: _Head = jax.tree.map(
        lambda a: lax.dynamic_slice_in_dim(a, start, size, a.ndim - 1), head
    )
    return columns


def _classes(head: _Head) -> int:
    return int(jax.tree.leaves(head)[0].shape[-1])


def _logits(head: _Head, features: Features) -> Array:
    """For half precision in float32."""
    z = reduce(jnp.add, [product(term, None) for term in zip(features, head.matrices, strict=True)])
    return z if head.bias is None else z + head.bias.astype(z.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(settings: _Settings, head: _Head, features: Features, labels: Array) -> Array:
    return _forward(settings, head, features, labels)[0]


def _forward(
    settings: _Settings, head: _Head, features: Features, labels: Array
) -> tuple[Array, Any]:
    _, smoothing, z_loss = settings
    classes, rows = _classes(head), len(labels)
    dtype = _wide(features)

    def add_chunk(carry: Any, columns: _Head, start: Any) -> Any:
        largest, total, label_logit, sum_of_logits = carry
        z = _logits(columns, features)
        new_largest = jnp.maximum(largest, z.max(1))
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0)
        total = total * jnp.exp(largest - shift) + jnp.exp(z - shift[:, None]).sum(1)
        label_logit += jnp.where(_is_label(labels, z, start), z, 0).sum(1)
        if smoothing:
            sum_of_logits += z.sum(1)
        return new_largest, total, label_logit, sum_of_logits

    known = (labels >= 0) & (labels < classes)
    zeros = jnp.zeros(rows, dtype)
    carry = (jnp.full(rows, -jnp.inf, dtype), zeros, jnp.where(known, zeros, jnp.nan), zeros)
    largest, total, label_logit, sum_of_logits = _for_chunks(
        head, settings.chunk_size, add_chunk, carry
    )
    lse = jnp.where(jnp.isfinite(largest), largest, 0) + jnp.log(total)
    losses = lse - (1 - smoothing) * label_logit
    if smoothing:
        losses -= smoothing / classes * sum_of_logits
    if z_loss:
        losses += z_loss * lse**2
    return losses, (head, features, labels, lse)


def _backward(settings: _Settings, residuals: Any, cotangent: Array) -> Any:
    head, features, labels, lse = residuals
    _, smoothing, z_loss = settings
    classes, dtype = _classes(head), _wide(features)
    known = (labels >= 0) & (labels < classes)
    cotangent = jnp.where(known, cotangent, jnp.nan)[:, None]
    softmax_cotangent = cotangent * (1 + 2 * z_loss * lse[:, None])

    def add_chunk(carry: Any, columns: _Head, start: Any) -> Any:
        head_cotangent, features_cotangent = carry
        z = _logits(columns, features)
        z_cotangent = jnp.exp(z - lse[:, None]) * softmax_cotangent
        z_cotangent -= jnp.where(_is_label(labels, z, start), (1 - smoothing) * cotangent, 0)
        if smoothing:
            z_cotangent -= smoothing / classes * cotangent
        weights = [_dense(matrix, dtype) for matrix in columns.matrices]
        features_cotangent = tuple(
            total + matrix_product(z_cotangent, weight.T)
            for total, weight in zip(features_cotangent, weights, strict=True)
        )
        columns_cotangent = _Head(
            tuple(
                _pull_back(matrix, matrix_product(f.astype(dtype).T, z_cotangent))
                for f, matrix in zip(features, columns.matrices, strict=True)
            ),
            None if columns.bias is None else z_cotangent.sum(0),
        )
        return (
            jax.tree.map(partial(_put, start), head_cotangent, columns_cotangent),
            features_cotangent,
        )

    nothing = (
        jax.tree.map(lambda a: None if a.dtype == jnp.int8 else jnp.zeros(a.shape, a.dtype), head),
        tuple(jnp.zeros(f.shape, dtype) for f in features),
    )
    head_cotangent, features_cotangent = _for_chunks(head, settings.chunk_size, add_chunk, nothing)
    rounded = tuple(c.astype(f.dtype) for c, f in zip(features_cotangent, features, strict=True))
    return head_cotangent, rounded, None


_losses.defvjp(_forward, _backward)


def _is_label(labels: Array, z: Array, start: Any) -> Array:
    hits: Array = labels[:, None] - start == jnp.arange(z.shape[1])
    return hits


def _wide(features: Features) -> DTypeLike:
    return accumulation_dtype(features[0].dtype) or features[0].dtype


def _dense(matrix: Matrix, dtype: DTypeLike) -> Array:
    if isinstance(matrix, QuantizedParams):
        return dequantized(matrix.weight, matrix.scale, dtype)
    dense: Array = matrix.astype(dtype)
    return dense


def _pull_back(matrix: Matrix, cotangent: Array) -> Any:
    """The cotangent of a matrix's arrays, `None` for integers."""
    if isinstance(matrix, QuantizedParams):
        scaled = partial(dequantized, matrix.weight, dtype=cotangent.dtype)
        (scale_cotangent,) = jax.vjp(scaled, matrix.scale)[1](cotangent)
        return QuantizedParams(None, scale_cotangent, None)  # type: ignore[arg-type]
    return cotangent


def _put(start: Any, array: Array, columns: Array) -> Array:
    columns = columns.astype(array.dtype)
    updated: Array = lax.dynamic_update_slice_in_dim(array, columns, start, array.ndim - 1)
    return updated


def _top_k(
    function: str,
    params: Layer,
    x: Array,
    k: int,
    axis: int | tuple[int, ...],
    chunk_size: int | None,
) -> tuple[Array, Array]:
    head, features, batch_shape = _make_head(function, params, x, axis)
    classes = _classes(head)
    if not 1 <= check_count(function, "k", k) <= classes:
        raise ValueError(f"{function}: k must be from 1 to the {classes} classes, got {k}")
    chunk_size = _check_chunk_size(function, chunk_size, features)

    def merge(best: tuple[Array, Array], columns: _Head, start: Any) -> tuple[Array, Array]:
        z = _logits(columns, features)
        values, places = lax.top_k(z, min(k, z.shape[1]))
        values = jnp.concatenate([best[0], values], 1)
        candidates = jnp.concatenate([best[1], places + start], 1)
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(candidates, places, 1)

    first = max(k, min(chunk_size, classes))
    values, found = lax.top_k(_logits(_columns(head, 0, first), features), k)
    values, found = _for_chunks(head, chunk_size, merge, (values, found), begin=first)
    values = values.astype(features[0].dtype)
    return values.reshape(*batch_shape, k), found.reshape(*batch_shape, k)
