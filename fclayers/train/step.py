"""One step of the optimizer: the loss, its gradients, the update; and batches of samples."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from fclayers._util.checks import check_count, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.trees import path_name
from fclayers.train.state import (
    Optimizer,
    Params,
    TrainState,
    check_optimizer,
    trainable,
    with_trained,
)

Batch: TypeAlias = PyTree
Metrics = dict[str, Array]
LossFn = Callable[[Params, Batch, PRNGKeyArray], ArrayLike | tuple[ArrayLike, Metrics]]
Stepped = tuple[TrainState, Metrics]
Step = Callable[[TrainState, Batch], Stepped]
Gradients = Callable[[Params, Batch, PRNGKeyArray], tuple[Params, Metrics]]

_EXPECTED = "expected loss_fn(params, batch, key) -> loss or (loss, metrics)"


@public
def make_step(loss_fn: LossFn, optimizer: Optimizer, *, accumulate: int = 1) -> Step:
    """Makes a jitted function that does one step of the optimizer.

    Args:
        loss_fn: A function `loss_fn(params, batch, key)` that returns the loss, a floating-point
            scalar and mean over the samples of the batch, or `(loss, metrics)` with a dict of
            further real scalars. A fresh key is passed at each step.
        optimizer: An optax optimizer.
        accumulate: Into how many parts a batch is split, to need less memory. Loss, metrics and
            gradients are averaged over them, each part with a key of its own.

    Returns:
        A function `step(state, batch)` that returns the next state and the metrics, the loss under
        `"loss"`. A batch is any pytree of arrays with the samples along their first axes. The state
        that is passed in is donated: its memory becomes the next state's.

    Raises:
        TypeError: `loss_fn` does not take three arguments or `optimizer` is not an optax optimizer;
            in a step, `loss_fn` returns something else.
        ValueError: `accumulate` is less than 1; in a step, the loss or a metric is not a scalar, or
            the arrays of the batch have different numbers of samples, or none.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import fclayers as fc
        >>> def loss_fn(params, batch, key):
        ...     return jnp.mean((fc.apply_linear(params, batch["x"]) - batch["y"]) ** 2)
        >>> optimizer = optax.adam(1e-2)
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.train.init_state(params, optimizer, jax.random.key(1))
        >>> data = {"x": jnp.ones((8, 3)), "y": jnp.ones((8, 1))}
        >>> step = fc.train.make_step(loss_fn, optimizer)
        >>> state, metrics = step(state, data)
        >>> epoch = fc.train.make_epoch(loss_fn, optimizer, batch_size=3)
        >>> state, metrics = epoch(state, data)
        >>> int(state.step), metrics["loss"].shape
        (4, (3,))
    """
    body = make_body(loss_fn, optimizer, accumulate)

    def step(state: TrainState, batch: Batch) -> Stepped:
        count_samples(batch)
        return isolated(body, state, batch)

    return jax.jit(public(step, "make_step"), donate_argnames="state")


@dataclass(frozen=True)
class Body:
    """A function that does one step, hashed by its arguments: equal ones are compiled once."""

    loss_fn: LossFn
    optimizer: Optimizer
    accumulate: int

    def __call__(self, state: TrainState, batch: Batch) -> Stepped:
        """Does one step of the optimizer."""
        from optax import apply_updates  # type: ignore[import-untyped]

        _, loss_key = jax.random.split(state.key)
        key = jax.random.fold_in(loss_key, state.step)
        trained = trainable(state.params)

        def loss_and_metrics(
            trained: Params, batch: Batch, key: PRNGKeyArray
        ) -> tuple[Array, Metrics]:
            return _check_returned(self.loss_fn(with_trained(state.params, trained), batch, key))

        gradients_of: Gradients = jax.grad(loss_and_metrics, has_aux=True)
        parts = min(self.accumulate, count_samples(batch))
        if parts == 1:
            gradients, metrics = gradients_of(trained, batch, key)
        else:
            gradients, metrics = _accumulate(gradients_of, trained, batch, key, parts)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        params = with_trained(state.params, apply_updates(trained, updates))
        return TrainState(params, opt_state, state.key, state.step + 1), metrics


def make_body(loss_fn: LossFn, optimizer: Optimizer, accumulate: int) -> Body:
    """Checks the arguments of `make_step`."""
    if not callable(loss_fn):
        raise BadType(f"{_EXPECTED}, got {describe(loss_fn)}")
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # Some callables have none.
        signature = None
    try:
        if signature is not None:
            signature.bind(None, None, None)
    except TypeError:
        raise BadType(f"{_EXPECTED}, got a function of {signature}") from None
    check_optimizer(optimizer)
    return Body(loss_fn, optimizer, check_at_least_one("accumulate", accumulate))


def isolated(body: Step, state: TrainState, batch: Batch) -> Stepped:
    """One step, as a loop of one pass whose length XLA does not know.

    XLA compiles the body of a loop by itself, and thus in the same way wherever the step stands.
    Fused with what is around it, a sum may be rounded in another way.
    """
    shapes = jax.eval_shape(lambda: body(state, batch)[1])
    metrics = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    one = (state.step >= 0).astype(jnp.int32)
    stepped: Stepped = lax.fori_loop(
        0, one, lambda _, carry: body(carry[0], batch), (state, metrics)
    )
    return stepped


def _accumulate(
    gradients_of: Gradients, trained: Params, batch: Batch, key: PRNGKeyArray, parts: int
) -> tuple[Params, Metrics]:
    """Gradients and metrics, averaged over the samples; the last part may be smaller."""
    samples = count_samples(batch)

    def weighted(i: int | Array, part: Batch) -> PyTree:
        weight = count_samples(part) / samples
        found = gradients_of(trained, part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a: a * weight, found)

    def add(total: PyTree, numbered: tuple[Array, Batch]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, weighted(*numbered)), None

    stacks = stack_batches(batch, -(-samples // parts))
    shapes = jax.eval_shape(weighted, 0, jax.tree.map(lambda a: a[0], stacks[0]))
    total: tuple[Params, Metrics] = jax.tree.map(jnp.zeros_like, shapes)
    done = 0
    for stack in stacks:
        count = count_samples(stack)
        total, _ = lax.scan(add, total, (jnp.arange(done, done + count), stack))
        done += count
    return total


def _check_returned(returned: object) -> tuple[Array, Metrics]:
    """The loss, and all metrics with it, of what `loss_fn` returned."""
    pair = returned if isinstance(returned, tuple) else (returned, {})
    if len(pair) != 2:
        raise BadType(f"{_EXPECTED}, got {len(pair)} values")
    loss, further = pair
    if not isinstance(further, dict):
        raise BadType(f"{_EXPECTED} with a dict of metrics, got {describe(further)}")
    for name, value in [("loss", loss), *further.items()]:
        kinds = [jnp.floating] if name == "loss" else [jnp.floating, jnp.integer, jnp.bool_]
        what = "a floating-point scalar" if name == "loss" else "a real scalar"
        message = f"{_EXPECTED} with {name!r} {what}, got {describe(value)}"
        if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            raise BadType(message)
        if jnp.shape(value) != ():
            raise BadValue(message)
        if not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds):
            raise BadType(message)
    return loss, {"loss": loss, **further}


class Run(NamedTuple):
    """How many epochs of how many samples, in batches of which size."""

    epochs: int
    num_samples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.num_samples // self.batch_size)

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    def samples_before(self, step: int) -> int:
        """The samples of all steps before this one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * self.num_samples + position * self.batch_size


def stack_batches(data: Batch, size: int) -> list[Batch]:
    """Cuts arrays into batches of `size` samples, stacked along a new first axis.

    What is left is a second stack, of one smaller batch.
    """
    samples = count_samples(data)
    full = samples - samples % size
    cuts = [(0, full, size), (full, samples, samples - full)]

    def cut(start: int, stop: int, size: int) -> Batch:
        return jax.tree.map(lambda a: a[start:stop].reshape(-1, size, *a.shape[1:]), data)

    return [cut(start, stop, size) for start, stop, size in cuts if start < stop]


def count_samples(data: Batch) -> int:
    """The length of the first axis that all arrays of a pytree share."""
    lengths = {
        path_name(path): np.shape(leaf)[0] if np.ndim(leaf) else None
        for path, leaf in jax.tree.leaves_with_path(data)
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        found = ", ".join(f"{path or 'it'} has {length}" for path, length in lengths.items())
        raise BadValue(
            f"expected arrays with the same number of samples along their first axes; "
            f"{found or 'there are no arrays'}"
        )
    (samples,) = set(lengths.values())
    if not samples:
        raise BadValue("expected at least one sample, got none")
    return int(samples)


def check_at_least_one(argument: str, count: int) -> int:
    """Returns a count, which must be an integer >= 1."""
    if (count := check_count(argument, count)) < 1:
        raise BadValue(f"{argument} must be at least 1, got {count}")
    return count
