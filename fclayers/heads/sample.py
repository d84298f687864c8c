"""Samples from the classes of a fully connected layer, without materializing the logits."""

from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from fclayers._util.checks import check_key
from fclayers._util.jit import jit
from fclayers.heads.checks import check_temperature
from fclayers.heads.measure import Options, Rows, check_head, measure
from fclayers.heads.predictions import largest_logits
from fclayers.heads.statistics import DRAW, LOG_SUM_EXP, Draw, together
from fclayers.linear import LinearParams


class Sample(NamedTuple):
    """The result of `linear_sample`.

    Attributes:
        labels: The classes that were drawn, int32 `(*batch)`.
        log_prob: Their log-probabilities under the distribution they were drawn from, `(*batch)`.
    """

    labels: Int[Array, "*batch"]
    log_prob: Float[Array, "*batch"]


@jit("axis", "chunk_size", "row_chunk_size", "top_k", "softcap", "dtype", "precision")
def linear_sample(
    key: PRNGKeyArray,
    params: LinearParams,
    x: Num[Array, "*batch_and_in"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    temperature: float | Num[Array, ""] | Num[Array, "*batch"] = 1.0,
    top_k: int | None = None,
    softcap: float | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Sample:
    """Draws a class for every position, without materializing the logits.

    Distributed like `jax.random.categorical(key, apply_linear(params, x) / temperature)`. A draw
    depends on the key, the position and the logits, but neither on the sizes of chunks nor on how
    arrays are sharded.

    Args:
        key: A key from `jax.random.key`.
        params: As in `linear_cross_entropy`.
        x: Input.
        axis: As in `apply_linear`.
        chunk_size: As in `linear_cross_entropy`.
        row_chunk_size: As in `linear_cross_entropy`.
        temperature: As in `linear_log_prob`. For the limit of 0, use `linear_argmax`.
        top_k: Draw from so many classes, those with the largest logits. Default: from all.
        softcap: As in `linear_cross_entropy`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        `Sample(labels, log_prob)`. The log-probabilities are in the dtype of `apply_linear`'s
        result, for half precision in float32, and differentiable in forward and reverse mode.

    Raises:
        TypeError: `key` is not a random key, or `params` is not a `LinearParams`.
        ValueError: `params` has several output axes or no class, `temperature` does not have the
            right shape, or an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> labels, log_prob = fc.linear_sample(jax.random.key(1), params, jnp.ones((8, 64)))
        >>> labels.shape, log_prob.shape
        ((8,), (8,))

    Source: the Gumbel-max trick, described by
    `Maddison et al. 2014, A* Sampling <https://arxiv.org/abs/1411.0030>`_, section 2.
    """
    check_key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision, softcap)
    head = check_head(params, x, options)
    batch = head.batch
    temperatures = check_temperature(temperature, batch)
    if top_k is not None:
        logits, classes = largest_logits(head, x, top_k, options)
        log_probs = jax.nn.log_softmax(logits / temperatures[..., None].astype(logits.dtype))
        chosen = jax.random.categorical(key, log_probs)[..., None] == jnp.arange(top_k)
        log_prob = jnp.where(chosen, log_probs, 0).sum(-1)
        return Sample(jnp.where(chosen, classes, 0).sum(-1), log_prob)
    numbers = jnp.arange(prod(batch), dtype=jnp.int32).reshape(batch)
    found: tuple[Array, Draw] = measure(
        together(LOG_SUM_EXP, DRAW),
        options,
        (head.params,),
        (x,),
        rows=Rows(temperature=temperatures, numbers=numbers),
        key=key,
    )
    log_sum, draw = found
    return Sample(draw.label, draw.logit - log_sum)
