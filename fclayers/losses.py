"""Cross-entropy of a fully connected layer's outputs, and predictions, without all the logits.

The classes are taken a chunk at a time. The forward pass keeps a running log-sum-exp; the backward
pass computes the logits of a chunk again. Where the classes are sharded, that is what happens to a
shard of them; what the shards know of a row is then put together.
"""

from collections.abc import Callable
from functools import partial, reduce
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from fclayers._checks import check_array, check_axes, check_count, describe
from fclayers._jit import jit
from fclayers._matrix_product import accumulation_dtype, matrix_product
from fclayers._mesh import mesh_axes, mesh_of, on_any_mesh, partition, spec_of
from fclayers._quantized_product import dequantized
from fclayers.forms import (
    Layer,
    Matrix,
    QuantizedParams,
    bias_of,
    check_input,
    output_spec,
    product,
    rows_of_features,
    terms,
)
from fclayers.sharding import linear_specs


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
    so are its gradients with respect to `params` and `x`. On a mesh with explicit axes every device
    takes its own classes.

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
    classes, batch_shape = _check_head(name, params, x, axis)
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
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    known = (labels >= 0) & (labels < classes)
    counts, weights = None, jnp.ones(())
    if where is not None:
        counts, weights = jnp.asarray(where) != 0, jnp.asarray(where)
        known |= ~counts

    def statistics(shard: Any, params: Layer, x: Array, labels: Array, counts: Any) -> _Statistics:
        head, features = _make_head(name, params, x, axis)
        settings = _Settings(_check_chunk_size(name, chunk_size, features), label_smoothing > 0)
        if counts is not None:
            features = tuple(jnp.where(counts.reshape(-1, 1), f, 0) for f in features)
        found = _statistics(settings, head, features, labels.ravel() - shard * _classes(head))
        return _Statistics(*(a.reshape(labels.shape) for a in found))

    found = _per_shard(statistics, params, x, axis, labels, counts)
    lse: Array = jax.nn.logsumexp(found.lse, axis=0)
    losses: Array = lse - (1 - label_smoothing) * found.label_logit.sum(0)
    if label_smoothing:
        losses -= label_smoothing / classes * found.sum_of_logits.sum(0)
    if z_loss:
        losses += z_loss * lse**2
    losses *= jnp.where(known, 1, jnp.nan).astype(losses.dtype)
    if counts is not None:
        losses = jnp.where(counts, losses * weights.astype(losses.dtype), 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = losses.size if where is None else weights.astype(losses.dtype).sum()
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
    sum_logits: bool


class _Statistics(NamedTuple):
    """What the loss needs to know of the logits of every row."""

    lse: Array
    label_logit: Array
    sum_of_logits: Array


Features = tuple[Array, ...]


def _check_head(
    function: str, params: Layer, x: Array, axis: int | tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """The number of classes and the shape of the batch."""
    axes, shapes, _ = check_input(function, params, x, axis, None)
    if len(shapes[1]) != 1:
        raise ValueError(
            f"{function}: expected a layer with one output axis, the classes, "
            f"got outputs of shape {shapes[1]}"
        )
    return shapes[1][0], tuple(size for a, size in enumerate(x.shape) if a not in axes)


def _make_head(
    function: str, params: Layer, x: Array, axis: int | tuple[int, ...]
) -> tuple[_Head, Features]:
    """The head, and the features that its matrices multiply as `(rows, n)`."""
    rows, shapes, dtype = rows_of_features(function, params, x, axis, None)
    flat = rows.reshape(prod(rows.shape[:-1]), rows.shape[-1])
    features, matrices = zip(*terms(params, flat, shapes, dtype, None), strict=True)
    bias = bias_of(params)
    return _Head(matrices, None if bias is None else bias.astype(dtype)), features


def _per_shard(
    function: Callable[..., Any],
    params: Layer,
    x: Array,
    axis: int | tuple[int, ...],
    *per_position: Any,
) -> Any:
    """Calls `function(shard, params, x, *per_position)` for every shard of the classes.

    The results, which begin with the axes of the batch, get a leading axis: the shards. There is
    one, unless the arrays lie on an explicit mesh.
    """
    mesh = mesh_of((params, x, *per_position))
    if mesh is None:
        return jax.tree.map(lambda a: a[None], function(0, params, x, *per_position))
    axes = check_axes("", axis, x.shape)
    x_spec = partition(*(None if a in axes else s for a, s in enumerate(spec_of(x))))
    batch_spec = [s for a, s in enumerate(x_spec) if a not in axes]
    in_batch = {name for entry in batch_spec for name in mesh_axes(entry)}
    (entry,) = output_spec(params, len(axes))
    shards = tuple(name for name in mesh_axes(entry) if name not in in_batch)
    in_specs = (
        linear_specs(params, "column", axis=shards),
        x_spec,
        *(jax.tree.map(lambda _: partition(*batch_spec), a) for a in per_position),
    )

    def run(*args: Any) -> Any:
        shard = lax.axis_index(shards) if shards else 0
        return jax.tree.map(lambda a: a[None], function(shard, *args))

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=partition(shards or None, *batch_spec),
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), in_specs)
    arrays = (params, x, *per_position)
    return sharded(*jax.sharding.reshard(arrays, shardings))  # type: ignore[no-untyped-call]


def _check_chunk_size(function: str, chunk_size: int | None, features: Features) -> int:
    if chunk_size is None:
        inputs = sum(f.shape[1] for f in features)
        rows = features[0].shape[0]
        at_least = rows if isinstance(rows, int) else 0  # the symbolic batch of an export
        return max(1, inputs, 2**20 // max(1, inputs, at_least))
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
def _statistics(settings: _Settings, head: _Head, features: Features, labels: Array) -> _Statistics:
    return _forward(settings, head, features, labels)[0]


def _forward(
    settings: _Settings, head: _Head, features: Features, labels: Array
) -> tuple[_Statistics, Any]:
    rows, dtype = labels.shape[0], _wide(features)

    def add_chunk(carry: Any, columns: _Head, start: Any) -> Any:
        largest, total, label_logit, sum_of_logits = carry
        z = _logits(columns, features)
        new_largest = jnp.maximum(largest, z.max(1))
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0)
        total = total * jnp.exp(largest - shift) + jnp.exp(z - shift[:, None]).sum(1)
        label_logit += jnp.where(_is_label(labels, z, start), z, 0).sum(1)
        if settings.sum_logits:
            sum_of_logits += z.sum(1)
        return new_largest, total, label_logit, sum_of_logits

    zeros = jnp.zeros(rows, dtype)
    carry = (jnp.full(rows, -jnp.inf, dtype), zeros, zeros, zeros)
    largest, total, label_logit, sum_of_logits = _for_chunks(
        head, settings.chunk_size, add_chunk, carry
    )
    lse = jnp.where(jnp.isfinite(largest), largest, 0) + jnp.log(total)
    return _Statistics(lse, label_logit, sum_of_logits), (head, features, labels, lse)


def _backward(settings: _Settings, residuals: Any, cotangents: _Statistics) -> Any:
    head, features, labels, lse = residuals
    dtype = _wide(features)
    lse_cotangent, label_cotangent, sum_cotangent = (c[:, None] for c in cotangents)
    # A shard may have only classes with minus infinity as their bias.
    shift = jnp.where(lse == -jnp.inf, 0, lse)[:, None]

    def add_chunk(carry: Any, columns: _Head, start: Any) -> Any:
        head_cotangent, features_cotangent = carry
        z = _logits(columns, features)
        z_cotangent = jnp.exp(z - shift) * lse_cotangent
        z_cotangent += jnp.where(_is_label(labels, z, start), label_cotangent, 0)
        if settings.sum_logits:
            z_cotangent += sum_cotangent
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


_statistics.defvjp(_forward, _backward)


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
    classes, batch_shape = _check_head(function, params, x, axis)
    if not 1 <= check_count(function, "k", k) <= classes:
        raise ValueError(f"{function}: k must be from 1 to the {classes} classes, got {k}")

    def best_of(shard: Any, params: Layer, x: Array) -> tuple[Array, Array]:
        head, features = _make_head(function, params, x, axis)
        size = _check_chunk_size(function, chunk_size, features)
        values, found = _best(head, features, min(k, _classes(head)), size)
        values, found = values.astype(features[0].dtype), found + shard * _classes(head)
        shape = *_check_head(function, params, x, axis)[1], values.shape[1]
        return values.reshape(shape), found.reshape(shape)

    def side_by_side(a: Array) -> Array:
        return jnp.moveaxis(a, 0, -2).reshape(*batch_shape, a.shape[0] * a.shape[-1])

    best = _per_shard(best_of, params, x, axis)
    spec = [*spec_of(best[0])[1:-1], None]
    values, found = (on_any_mesh(side_by_side, lambda: spec, a) for a in best)
    values, places = lax.top_k(values, k)
    return values, jnp.take_along_axis(found, places, -1)


def _best(head: _Head, features: Features, k: int, chunk_size: int) -> tuple[Array, Array]:
    """The `k` largest logits of every row and their classes, each `(rows, k)`."""

    def merge(best: tuple[Array, Array], columns: _Head, start: Any) -> tuple[Array, Array]:
        z = _logits(columns, features)
        values, places = lax.top_k(z, min(k, z.shape[1]))
        values = jnp.concatenate([best[0], values], 1)
        candidates = jnp.concatenate([best[1], places + start], 1)
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(candidates, places, 1)

    first = max(k, min(chunk_size, _classes(head)))
    best = lax.top_k(_logits(_columns(head, 0, first), features), k)
    values, found = _for_chunks(head, chunk_size, merge, tuple(best), begin=first)
    return values, found
