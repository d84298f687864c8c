"""Cross-entropy of a fully connected layer's outputs, without materializing the logits."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Num

from fclayers._util.checks import check_array, describe
from fclayers._util.errors import BadType, BadValue
from fclayers._util.jit import jit
from fclayers.heads.chunks import check_head, choose_chunk_size, make_head
from fclayers.heads.shards import per_shard
from fclayers.heads.statistics import Settings, Statistics, statistics
from fclayers.linear import LinearParams


@jit("axis", "chunk_size", "label_smoothing", "z_loss", "reduction")
def linear_cross_entropy(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    labels: Integer[Array, "*batch"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    where: Num[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Float[Array, "*batch"] | Float[Array, ""]:
    """Softmax cross-entropy of `apply_linear(params, x)`, without materializing the logits.

    Equal to `optax.softmax_cross_entropy_with_integer_labels(apply_linear(params, x), labels)`, and
    so are its gradients with respect to `params` and `x`. On a mesh with explicit axes every device
    computes the logits of its own classes.

    Args:
        params: The layer, with one output axis: the classes. `WeightNorm` and `BlockDiagonal`
            weights are materialized; the logits are not.
        x: Input.
        labels: The classes, from 0. A label out of range gives NaN, and NaN gradients, unless
            `where` ignores it.
        axis: As in `apply_linear`.
        chunk_size: Number of classes whose logits are in memory at a time. Default: as many as
            take no more memory than `x`, or 4 MB.
        label_smoothing: Share of the labels' probability, in [0, 1], that is spread evenly over all
            classes, as in PyTorch.
        z_loss: Factor of the squared log-sum-exp, which is added to keep the logits from drifting.
        where: Which positions count: booleans, or weights of the losses. A position of weight zero
            has no influence, whatever its label and input.
        reduction: `"none"` for one loss per position; `"sum"`; or `"mean"`, the sum over the sum of
            the weights (0 if that is 0).

    Returns:
        Losses of shape `(*batch)` or a scalar, in the dtype of `apply_linear`'s result, for half
        precision in float32. Differentiable in reverse mode.

    Raises:
        TypeError: `params` is not a `LinearParams`, or the labels are not integers.
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
    params, classes, batch_shape = check_head(params, x, axis)
    check_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise BadType(f"labels must be integers, got {describe(labels)}")
    for argument, value in (("labels", labels), ("where", where)):
        if value is not None and jnp.shape(value) != batch_shape:
            raise BadValue(
                f"{argument} must have the shape {batch_shape} of the batch, x has shape "
                f"{x.shape} and features along axis={axis}, got {describe(value)}"
            )
    if not 0 <= label_smoothing <= 1:
        raise BadValue(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise BadValue(f"z_loss must be >= 0, got {z_loss}")
    if reduction not in ("none", "mean", "sum"):
        raise BadValue(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    known = (labels >= 0) & (labels < classes)
    counts, weights = None, jnp.ones(())
    if where is not None:
        counts, weights = jnp.asarray(where) != 0, jnp.asarray(where)
        known |= ~counts

    def of_shard(
        shard: int | Array, params: LinearParams, x: Array, labels: Array, counts: Array | None
    ) -> Statistics:
        head, features = make_head(params, x, axis)
        settings = Settings(choose_chunk_size(chunk_size, features), label_smoothing > 0)
        if counts is not None:
            features = tuple(jnp.where(counts.reshape(-1, 1), f, 0) for f in features)
        found = statistics(settings, head, features, labels.ravel() - shard * head.classes)
        return Statistics(*(a.reshape(labels.shape) for a in found))

    found: Statistics = per_shard(of_shard, params, x, axis, labels, counts)
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
