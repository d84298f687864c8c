"""Log-probabilities and log-sum-exps of many classes, without materializing the logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Num

from fclayers._util.jit import jit
from fclayers.heads.checks import check_batch, check_labels, check_temperature
from fclayers.heads.measure import Options, Rows, check_head, measure
from fclayers.heads.statistics import LOG_SUM_EXP, LOGIT_OF_LABEL, SOFTMAX, Softmax, together
from fclayers.linear import LinearParams


class LogProb(NamedTuple):
    """The result of `linear_log_prob`.

    Attributes:
        log_prob: Log-probabilities of the labels, `(*batch)`.
        entropy: Entropies of the distributions, in nats, `(*batch)`.
    """

    log_prob: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]


@jit("axis", "chunk_size", "row_chunk_size", "softcap", "dtype", "precision")
def linear_log_prob(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    labels: Integer[Array, "*batch"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    temperature: float | Num[Array, ""] | Num[Array, "*batch"] = 1.0,
    softcap: float | None = None,
    where: Num[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> LogProb:
    """Log-probabilities of labels, and entropies, without materializing the logits.

    For `p = jax.nn.log_softmax(apply_linear(params, x) / temperature)`, the entries of `p` for the
    labels, and `-(exp(p) * p).sum(-1)`: what policy gradients and preference losses are made of.
    Both come from one pass, and are differentiable in forward and reverse mode.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        labels: The classes, from 0. One out of range gives NaN as its log-probability, and NaN
            gradients, unless `where` ignores it.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.
        row_chunk_size: As in `linear_cross_entropy`.
        temperature: What the logits are divided by, after `softcap`: a number > 0, or one per
            position. It may be traced.
        softcap: As in `linear_cross_entropy`.
        where: Which positions count. At the others, both results are 0, without any influence.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        `LogProb(log_prob, entropy)`, in the dtype of `apply_linear`'s result, for half precision in
        float32.

    Raises:
        TypeError: `params` is not a `LinearParams`, or the labels are not integers.
        ValueError: `params` has several output axes, `labels`, `where` or `temperature` does not
            have the right shape, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> log_prob, entropy = fc.linear_log_prob(params, jnp.ones((8, 64)), jnp.arange(8))
        >>> log_prob.shape, entropy.shape
        ((8,), (8,))
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision, softcap)
    params, classes, batch, _ = check_head(params, x, options)
    labels = check_labels(labels, x, axis, batch)
    check_batch("where", where, x, axis, batch)
    counts = None if where is None else jnp.asarray(where) != 0
    found: tuple[Softmax, Array] = measure(
        together(SOFTMAX, LOGIT_OF_LABEL),
        options,
        (params,),
        (x,),
        rows=Rows(counts, check_temperature(temperature, batch), labels),
    )
    (log_sum, entropy), logit = found
    possible = log_sum > -jnp.inf
    known = possible & (labels >= 0) & (labels < classes)

    def only(valid: Array, values: Array) -> Array:
        if counts is not None:
            valid |= ~counts
        values = values * jnp.where(valid, 1, jnp.nan).astype(values.dtype)
        return values if counts is None else jnp.where(counts, values, 0)

    return LogProb(only(known, logit - log_sum), only(possible, entropy))


@jit("axis", "chunk_size", "row_chunk_size", "softcap", "dtype", "precision")
def linear_logsumexp(
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    temperature: float | Num[Array, ""] | Num[Array, "*batch"] = 1.0,
    softcap: float | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch"]:
    """The logarithm of the sum of exponentials of the logits, without materializing them.

    Equal to `jax.nn.logsumexp(apply_linear(params, x) / temperature, axis=-1)`, and differentiable
    in forward and reverse mode.

    Args:
        params: As in `linear_cross_entropy`.
        x: Input.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.
        row_chunk_size: As in `linear_cross_entropy`.
        temperature: As in `linear_log_prob`.
        softcap: As in `linear_cross_entropy`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Array of shape `(*batch)`, in the dtype of `apply_linear`'s result, for half precision in
        float32.

    Raises:
        TypeError: `params` is not a `LinearParams`.
        ValueError: `params` has several output axes, `temperature` does not have the right shape,
            or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> fc.linear_logsumexp(params, jnp.ones((8, 64))).shape
        (8,)
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision, softcap)
    params, _, batch, _ = check_head(params, x, options)
    rows = Rows(temperature=check_temperature(temperature, batch))
    found: Array = measure(LOG_SUM_EXP, options, (params,), (x,), rows=rows)
    return found
