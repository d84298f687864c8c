"""Divergences between the outputs of two layers, without materializing any logits."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from fclayers._util.errors import BadValue
from fclayers._util.jit import jit
from fclayers.heads.checks import (
    Reduction,
    check_batch,
    check_reduction,
    check_temperature,
    reduce_losses,
)
from fclayers.heads.measure import Options, Rows, check_head, measure
from fclayers.heads.statistics import JENSEN_SHANNON, LOG_SUM_EXPS, divergence
from fclayers.linear import LinearParams

_STUDENT, _TEACHER = 0, 1


@jit(
    "axis",
    "chunk_size",
    "row_chunk_size",
    "direction",
    "softcap",
    "reduction",
    "dtype",
    "precision",
)
def linear_distillation(
    student: LinearParams,
    teacher: LinearParams,
    x_student: Num[Array, "*batch_and_in"],
    x_teacher: Num[Array, "*batch_and_in_of_teacher"],
    *,
    axis: int | tuple[int, ...] = -1,
    chunk_size: int | None = None,
    row_chunk_size: int | None = None,
    temperature: float | Num[Array, ""] | Num[Array, "*batch"] = 1.0,
    direction: Literal["forward", "reverse", "jensen_shannon"] = "forward",
    softcap: float | None = None,
    where: Num[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "none",
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*batch"] | Float[Array, ""]:
    """The divergence between two heads, neither of whose logits are materialized.

    For the probabilities `p` of the teacher and `q` of the student, `softmax(logits /
    temperature)`, the Kullback-Leibler divergence `Σ p log(p / q)` (`"forward"`) or `Σ q log(q /
    p)` (`"reverse"`), or the mean of both to the mixture `(p + q) / 2` (`"jensen_shannon"`, which
    reads the heads twice). It is differentiable in forward and reverse mode with respect to both
    heads and inputs; for a fixed teacher, take its gradient with respect to the student only, or
    use `jax.lax.stop_gradient`.

    Args:
        student: As `params` in `linear_cross_entropy`.
        teacher: A layer with the same classes. Its inputs may be others.
        x_student: Input of the student.
        x_teacher: Input of the teacher, with the same batch.
        axis: As in `apply_linear`, for both.
        chunk_size: As in `linear_cross_entropy`.
        row_chunk_size: As in `linear_cross_entropy`.
        temperature: As in `linear_log_prob`, for both. The loss is not multiplied by its square.
        direction: Which divergence.
        softcap: As in `linear_cross_entropy`, for both.
        where: As in `linear_cross_entropy`.
        reduction: As in `linear_cross_entropy`.
        dtype: As in `apply_linear`.
        precision: As in `apply_linear`.

    Returns:
        Losses of shape `(*batch)` or a scalar, in the dtype of `apply_linear`'s results, for half
        precision in float32. A class that is impossible for one of the heads gives infinity where
        the other's probability counts.

    Raises:
        TypeError: `student` or `teacher` is not a `LinearParams`.
        ValueError: The layers do not have the same classes or their inputs the same batch, an
            argument does not have the right shape, or is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> student = fc.init_linear(jax.random.key(0), 64, 50_000)
        >>> teacher = fc.init_linear(jax.random.key(1), 256, 50_000)
        >>> x_student, x_teacher = jnp.ones((8, 64)), jnp.ones((8, 256))
        >>> fc.linear_distillation(student, teacher, x_student, x_teacher, temperature=2.0).shape
        (8,)

    Source: `Hinton et al. 2015, Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_; the other directions are those of `Agarwal et al. 2024,
    On-Policy Distillation <https://arxiv.org/abs/2306.13649>`_, section 2.
    """
    options = Options(axis, chunk_size, row_chunk_size, dtype, precision, softcap)
    student, classes, batch, _ = check_head(student, x_student, options)
    teacher, others, batch_of_teacher, _ = check_head(teacher, x_teacher, options)
    if classes != others:
        raise BadValue(
            f"expected both layers to have the same classes, the student has {classes} and the "
            f"teacher {others}"
        )
    if batch != batch_of_teacher:
        raise BadValue(
            f"expected both inputs to have the same batch, the student's is {batch} and the "
            f"teacher's {batch_of_teacher}"
        )
    check_batch("where", where, x_student, axis, batch)
    check_reduction(reduction)
    counts = None if where is None else jnp.asarray(where) != 0
    rows = Rows(counts, check_temperature(temperature, batch))
    layers, inputs = (student, teacher), (x_student, x_teacher)
    if direction == "jensen_shannon":
        log_sums = measure(LOG_SUM_EXPS, options, layers, inputs, rows=rows)
        rows = rows._replace(log_sums=log_sums)
        losses: Array = measure(JENSEN_SHANNON, options, layers, inputs, rows=rows)
    elif direction in ("forward", "reverse"):
        p, q = (_TEACHER, _STUDENT) if direction == "forward" else (_STUDENT, _TEACHER)
        *log_sums, losses = measure(divergence(p, q), options, layers, inputs, rows=rows)
    else:
        raise BadValue(
            f"direction must be 'forward', 'reverse' or 'jensen_shannon', got {direction!r}"
        )
    possible = (log_sums[0] > -jnp.inf) & (log_sums[1] > -jnp.inf)
    if counts is not None:
        possible |= ~counts
    losses *= jnp.where(possible, 1, jnp.nan).astype(losses.dtype)
    return reduce_losses(losses, where, reduction)
