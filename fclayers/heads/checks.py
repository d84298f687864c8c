"""Checks of the arguments that several functions of heads take, and reductions."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from fclayers._util.checks import check_array, describe
from fclayers._util.errors import BadType, BadValue

Reduction = Literal["none", "mean", "sum"]


def check_batch(name: str, value: Any, x: Array, axis: Any, batch: tuple[int, ...]) -> None:
    """Raises unless there is one number per position."""
    if value is not None and jnp.shape(value) != batch:
        raise BadValue(
            f"{name} must have the shape {batch} of the batch, x has shape {x.shape} and features "
            f"along axis={axis}, got {describe(value)}"
        )


def check_labels(labels: Any, x: Array, axis: Any, batch: tuple[int, ...]) -> Array:
    """The numbers of classes, at least as int32; raises unless they are `(*batch)`."""
    check_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise BadType(f"labels must be integers, got {describe(labels)}")
    check_batch("labels", labels, x, axis, batch)
    numbers: Array = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return numbers


def check_temperature(temperature: Any, batch: tuple[int, ...]) -> Float[Array, "*batch"]:
    """The temperatures `(*batch)` of all positions."""
    if jnp.shape(temperature) not in ((), batch):
        raise BadValue(
            f"temperature must be a number or have the shape {batch} of the batch, "
            f"got {describe(temperature)}"
        )
    found = jnp.asarray(temperature)
    if not jnp.issubdtype(found.dtype, jnp.floating):
        found = found.astype(float)
    return jnp.broadcast_to(found, batch)


def check_reduction(reduction: str) -> None:
    """Raises unless it is one."""
    if reduction not in ("none", "mean", "sum"):
        raise BadValue(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def reduce_losses(
    losses: Float[Array, "*batch"],
    where: Num[Array, "*batch"] | Bool[Array, "*batch"] | None,
    reduction: Reduction,
    weights: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"] | Float[Array, ""]:
    """The losses times `where`, or 0 where that is 0, their sum, or their mean.

    The mean is the sum over that of `where`, times `weights` if the losses have such.
    """
    if where is not None:
        factors = jnp.asarray(where).astype(losses.dtype)
        losses = jnp.where(factors != 0, losses * factors, 0)
        weights = factors if weights is None else jnp.where(factors != 0, weights * factors, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = losses.size if weights is None else weights.sum()
    return jnp.where(total == 0, 0, losses.sum() / jnp.where(total == 0, 1, total))
