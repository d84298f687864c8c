"""Cross-entropy of a fully connected layer's outputs, without materializing the logits."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Num

from fclayers._util.checks import describe, is_array
from fclayers._util.errors import BadValue
from fclayers._util.jit import jit
from fclayers.heads.checks import (
    Reduction,
    check_batch,
    check_labels,
    check_reduction,
    reduce_losses,
)
from fclayers.heads.label_functions import LabelFunction
from fclayers.heads.measure import Options, Rows, check_head, measure
from fclayers.heads.statistics import (
    DOT_WITH_LABELS,
    LOG_SUM_EXP,
    LOGIT_OF_LABEL,
    SUM_OF_LABELS,
    SUM_OF_LOGITS,
    WEIGHT_OF_LABEL,
    together,
)
from fclayers.linear import LinearParams


@jit(
    "axis",
    "chunk_size",
    "row_chunk_size",
    "label_smoothing",
    "z_loss",
    "softcap",
    "reduction",
    "dtype",
    "precision",
    function_or_array="labels",
)
def linear_cross_entropy(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    labels: Integer[Array, "*batch"] | Float[Array, "*batch classes"] | LabelFunction,
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Num[Array, "classes"] | None = None,
    where: Num[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "none",
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch"] | Float[Array, ""]:
    """Softmax cross-entropy of `apply_linear(params, x)`, without materializing the logits.

    Equal to `optax.softmax_cross_entropy_with_integer_labels(apply_linear(params, x), labels)`, and
    so are its derivatives, in forward and reverse mode and of any order. On a mesh every device
    computes the logits of its own classes and positions.

    Args:
        params: The layer, with one output axis: the classes. `WeightNorm` and `BlockDiagonal`
            weights are materialized; the logits are not.
        x: Input.
        labels: The classes, from 0; the probabilities of all classes; or a function
            `labels(classes)` of an integer array `(chunk,)` of classes that returns their
            probabilities `(*batch, chunk)`, so that these are never whole. It may close over traced
            arrays, and derivatives with respect to these are exact; every call with a function
            compiles again, unless it is inside `jit`. A label out of range gives NaN, and NaN
            gradients, unless `where` ignores it.
        axis: As in `apply_linear`.
        chunk_size: Number of classes whose logits are in memory at a time. Default: from the
            shapes, so that a chunk takes no more memory than `x`, or 4 MB, and at most 64 MB.
        row_chunk_size: Number of positions whose logits are in memory at a time. Default: from the
            shapes, all unless a chunk would take more than 64 MB.
        label_smoothing: Share of the labels' probability, in [0, 1], that is spread evenly over all
            classes, as in PyTorch.
        z_loss: Factor of the squared log-sum-exp, which is added to keep the logits from drifting.
        softcap: Bound of the logits: they become `softcap * tanh(logits / softcap)`.
        class_weights: Factors of the classes in the sum over classes of labels times negative
            log-probabilities: PyTorch's `weight`.
        where: Which positions count: booleans, or weights of the losses. A position of weight zero
            has no influence, whatever its label and input.
        reduction: `"none"` for one loss per position; `"sum"`; or `"mean"`, the sum over the sum of
            the weights (0 if that is 0): of `where`, times the class weights of the labels if
            these are classes.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`, of all products.

    Returns:
        Losses of shape `(*batch)` or a scalar, in the dtype of `apply_linear`'s result, for half
        precision in float32.

    Raises:
        TypeError: `params` is not a `LinearParams`, or the labels are neither integers nor floats,
            nor a function that returns floats.
        ValueError: `params` has several output axes, `labels`, `where` or `class_weights` does not
            have the right shape, an argument is out of range, or `labels` is a function on a mesh
            with explicit axes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> x, labels = jnp.ones((8, 64)), jnp.arange(8)
        >>> fc.linear_cross_entropy(params, x, labels).shape
        (8,)

    Source: `Wijmans et al. 2024, Cut Your Losses <https://arxiv.org/abs/2411.09009>`_; the z-loss
    is that of `Chowdhery et al. 2022, PaLM <https://arxiv.org/abs/2204.02311>`_, section 5; the
    cap that of `Gemma 2 <https://arxiv.org/abs/2408.00118>`_, section 2.
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision, softcap)
    params, classes, batch, _ = check_head(params, x, options)
    soft = callable(labels) or (
        is_array(labels)
        and jnp.issubdtype(labels.dtype, jnp.floating)
        and labels.shape == (*batch, classes)
    )
    numbers = None if soft else check_labels(labels, x, axis, batch)
    check_batch("where", where, x, axis, batch)
    if class_weights is not None and jnp.shape(class_weights) != (classes,):
        raise BadValue(
            f"class_weights must have the shape ({classes},) of the classes, "
            f"got {describe(class_weights)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise BadValue(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise BadValue(f"z_loss must be >= 0, got {z_loss}")
    check_reduction(reduction)
    counts = None if where is None else jnp.asarray(where) != 0
    wanted = [LOG_SUM_EXP, DOT_WITH_LABELS if soft else LOGIT_OF_LABEL]
    weighted = soft or class_weights is not None
    if weighted:
        wanted.append(SUM_OF_LABELS if soft else WEIGHT_OF_LABEL)
    if label_smoothing:
        wanted.append(SUM_OF_LOGITS)
    log_sum, dot, *others = measure(
        together(*wanted),
        options,
        (params,),
        (x,),
        rows=Rows(counts=counts, labels=numbers),
        class_weights=class_weights,
        probabilities=labels if soft else None,
    )
    label_weights = others[0] if weighted and not soft else None
    if label_weights is not None:
        dot *= label_weights
    losses: Array = (others[0] * log_sum if weighted else log_sum) - dot
    if label_smoothing:
        total = classes if class_weights is None else class_weights.astype(dot.dtype).sum()
        uniform = (total * log_sum - others[-1]) / classes
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    if z_loss:
        losses += z_loss * log_sum**2
    known = log_sum > -jnp.inf
    if numbers is not None:
        known &= (numbers >= 0) & (numbers < classes)
    if counts is not None:
        known |= ~counts
    losses *= jnp.where(known, 1, jnp.nan).astype(losses.dtype)
    return reduce_losses(losses, where, reduction, label_weights)
