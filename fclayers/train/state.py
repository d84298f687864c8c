"""The state of training, and which of its parameters train."""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from fclayers._util.checks import check_key, describe
from fclayers._util.errors import BadType, public

if TYPE_CHECKING:  # optax takes longer to import than all of fclayers.
    import optax  # type: ignore[import-untyped]

Params: TypeAlias = PyTree
Optimizer: TypeAlias = "optax.GradientTransformation"


class TrainState(NamedTuple):
    """What training carries from step to step. Key and step decide every batch and every draw."""

    params: Params
    opt_state: PyTree
    key: PRNGKeyArray  # fixed; the keys of steps and epochs are folded from it
    step: Int[Array, ""]  # int32: the steps done


@public
def init_state(params: Params, optimizer: Optimizer, key: PRNGKeyArray) -> TrainState:
    """Makes the state at which training begins.

    Args:
        params: Any pytree of arrays. It is copied, because `make_step` donates its state.
            Floating-point and complex leaves train. Others, such as the values of an int8 weight,
            are kept; the optimizer sees `None` in their place.
        optimizer: An optax optimizer. Masks and labels in it may be trees of all leaves.
        key: A key from `jax.random.key`, for the order of the data and for the loss.

    Returns:
        `TrainState(params, opt_state, key, step)` with `step` zero.

    Raises:
        TypeError: `key` is not a random key, or `optimizer` is not an optax optimizer.

    Example: see `make_step`.
    """
    check_key(key)
    check_optimizer(optimizer)
    opt_state = optimizer.init(trainable(params))
    return own(TrainState(params, opt_state, key, jnp.zeros((), jnp.int32)))


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises unless `optimizer` has the methods of one of optax."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise BadType(f"expected optimizer to be an optax optimizer, got {describe(optimizer)}")


def own(state: TrainState) -> TrainState:
    """A copy that can be donated: no two arrays share memory, no dtype is weak."""
    copied: TrainState = jax.tree.map(
        lambda a: jnp.array(a, dtype=jnp.asarray(a).dtype, copy=True), state
    )
    return copied


def trainable(params: Params) -> Params:
    """The leaves that have gradients, and `None`, an empty subtree, in place of the others.

    A tree of all leaves is a prefix of this one, so optax's masks fit it.
    """
    return jax.tree.map(
        lambda a: a if jnp.issubdtype(getattr(a, "dtype", type(a)), jnp.inexact) else None, params
    )


def with_trained(params: Params, trained: Params) -> Params:
    """`params` with the leaves of `trained` where it has some."""
    return jax.tree.map(lambda old, new: old if new is None else new, params, trained)
