"""Training, jitted by the step and by the epoch: the state, the key and the order of the data."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

from fclayers._checks import check_count, check_key, describe

if TYPE_CHECKING:  # optax takes longer to import than all of fclayers.
    import optax  # type: ignore[import-untyped]

Params = Any
Batch = Any
Metrics = dict[str, Array]
LossFn = Callable[[Params, Batch, Array], Any]


class TrainState(NamedTuple):
    """What training carries from step to step. Key and step decide every batch and every draw."""

    params: Any
    opt_state: Any
    key: Array  # fixed; what is random in a step or an epoch is folded from it
    step: Array  # int32 scalar: the steps done


def init_state(
    params: Any, optimizer: "optax.GradientTransformation", key: Key[Array, ""]
) -> TrainState:
    """Makes the state at which training begins.

    Args:
        params: Any pytree of arrays. It is copied, because `make_step` takes over what it is given.
        optimizer: An optax optimizer.
        key: A key from `jax.random.key`, for the order of the data and for the loss.

    Returns:
        `TrainState(params, opt_state, key, step)` with `step` zero.

    Raises:
        TypeError: `key` is not a random key, or `optimizer` no optax optimizer.

    Example:
        >>> import jax
        >>> import optax
        >>> import fclayers as fc
        >>> params = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> int(fc.init_state(params, optax.adam(1e-3), jax.random.key(1)).step)
        0
    """
    check_key("init_state", key)
    _check_optimizer("init_state", optimizer)
    return own(TrainState(params, optimizer.init(params), key, jnp.zeros((), jnp.int32)))


def make_step(
    loss_fn: LossFn, optimizer: "optax.GradientTransformation", *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted function that does one step of the optimizer.

    Args:
        loss_fn: A function `loss_fn(params, batch, key)` that returns the loss, a scalar mean over
            the samples of the batch, or `(loss, metrics)` with a dict of further such scalars. The
            key is another one in every step.
        optimizer: An optax optimizer.
        accumulate: Into how many parts a batch is split, to need less memory. Loss, metrics and
            gradients are averaged over them, each part with a key of its own.

    Returns:
        A function `step(state, batch)` that returns the next state and the metrics, the loss under
        `"loss"`. A batch is any pytree of arrays with the samples along their first axes. The state
        that is passed in is donated: its memory becomes the next state's.

    Raises:
        TypeError: `loss_fn` or `optimizer` is not what it should be.
        ValueError: `accumulate` is less than 1; in a step, the loss is not a scalar, or the arrays
            of the batch have different numbers of samples, or none.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import fclayers as fc
        >>> def loss_fn(params, batch, key):
        ...     return jnp.mean((fc.apply_linear(params, batch["x"]) - batch["y"]) ** 2)
        >>> optimizer = optax.adam(1e-2)
        >>> step = fc.make_step(loss_fn, optimizer)
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.init_state(params, optimizer, jax.random.key(1))
        >>> state, metrics = step(state, {"x": jnp.ones((8, 3)), "y": jnp.ones((8, 1))})
        >>> int(state.step), list(metrics)
        (1, ['loss'])
    """
    name = "make_step"
    body = partial(take_step, check_arguments(name, loss_fn, optimizer, accumulate), name)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count_samples(name, batch)
        return _alone(body, state, batch)

    return jax.jit(step, donate_argnames="state")


def make_epoch(
    loss_fn: LossFn,
    optimizer: "optax.GradientTransformation",
    *,
    batch_size: int,
    shuffle: bool = True,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted function that does the steps of a whole epoch on the device.

    To the last bit it is the loop of `make_step` over the batches in the order of `epoch_order`.

    Args:
        loss_fn: As in `make_step`.
        optimizer: An optax optimizer.
        batch_size: Samples per step. What is left at the end is a step with a smaller batch.
        shuffle: Whether every epoch has a new order, or that of the data.
        accumulate: As in `make_step`.

    Returns:
        A function `epoch(state, data)` that returns the state after the epoch, and the metrics of
        its steps, each of shape `(steps,)`. `data` is a pytree of arrays with the samples along
        their first axes; a copy of it in the epoch's order is in memory meanwhile. The state is
        donated.

    Raises:
        TypeError: `loss_fn` or `optimizer` is not what it should be.
        ValueError: As in `make_step`, or `batch_size` is less than 1.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import fclayers as fc
        >>> def loss_fn(params, batch, key):
        ...     return jnp.mean((fc.apply_linear(params, batch["x"]) - batch["y"]) ** 2)
        >>> optimizer = optax.adam(1e-2)
        >>> epoch = fc.make_epoch(loss_fn, optimizer, batch_size=32)
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.init_state(params, optimizer, jax.random.key(1))
        >>> state, metrics = epoch(state, {"x": jnp.ones((100, 3)), "y": jnp.ones((100, 1))})
        >>> int(state.step), metrics["loss"].shape
        (4, (4,))
    """
    name = "make_epoch"
    body = partial(take_step, check_arguments(name, loss_fn, optimizer, accumulate), name)
    size = check_at_least_one(name, "batch_size", batch_size)

    def epoch(state: TrainState, data: Batch) -> tuple[TrainState, Metrics]:
        samples = count_samples(name, data)
        if shuffle:
            order = epoch_order(state, samples, batch_size=size)
            data = jax.tree.map(lambda a: a[order], data)
        full = samples // size
        pieces = []
        if full:
            batches = jax.tree.map(
                lambda a: a[: full * size].reshape(full, size, *a.shape[1:]), data
            )
            state, metrics = _loop(body, state, batches, 0, full)
            pieces.append(metrics)
        if full * size < samples:
            batches = jax.tree.map(lambda a: a[None, full * size :], data)
            state, metrics = _loop(body, state, batches, 0, 1)
            pieces.append(metrics)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)

    return jax.jit(epoch, donate_argnames="state")


@partial(jax.jit, static_argnames=("num_samples", "batch_size"))
def epoch_order(
    state: TrainState, num_samples: int, *, batch_size: int
) -> Int[Array, " num_samples"]:
    """Returns the order in which the epoch that `state.step` lies in takes the samples.

    Args:
        state: The state at any step of the epoch.
        num_samples: Samples of an epoch.
        batch_size: Samples per step.

    Returns:
        A permutation of the samples' indices, int32. Step `i` of the epoch takes the entries from
        `i * batch_size` on, `batch_size` of them or as many as are left.

    Example:
        >>> import jax
        >>> import optax
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.init_state(params, optax.adam(1e-2), jax.random.key(1))
        >>> sorted(fc.epoch_order(state, 5, batch_size=2).tolist())
        [0, 1, 2, 3, 4]
    """
    order_key, _ = jax.random.split(state.key)
    epoch = state.step // -(-num_samples // batch_size)
    # `jax.random.permutation` sorts twice, which was a seventh of a small network's epoch.
    draws = jax.random.bits(jax.random.fold_in(order_key, epoch), (num_samples,))
    _, order = lax.sort(
        (draws, jnp.arange(num_samples, dtype=jnp.int32)), num_keys=1, is_stable=False
    )
    return order


class StepArguments(NamedTuple):
    """The arguments of `make_step`."""

    loss_fn: LossFn
    optimizer: "optax.GradientTransformation"
    accumulate: int


@partial(jax.jit, static_argnames=("name", "arguments"), donate_argnames="state")
def run_steps(
    state: TrainState,
    batches: Batch,
    start: Array,
    stop: Array,
    *,
    name: str,
    arguments: StepArguments,
) -> tuple[TrainState, Metrics]:
    """Does the steps with the stacked batches `start` to `stop`; the other metrics are zero."""
    return _loop(partial(take_step, arguments, name), state, batches, start, stop)


def take_step(
    arguments: StepArguments, name: str, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer."""
    from optax import apply_updates

    loss_fn, optimizer, accumulate = arguments
    _, loss_key = jax.random.split(state.key)
    key = jax.random.fold_in(loss_key, state.step)

    def loss_and_metrics(params: Params, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        returned = loss_fn(params, batch, key)
        loss, further = returned if isinstance(returned, tuple) else (returned, {})
        metrics = {"loss": loss, **further}
        for entry, value in metrics.items():
            if jnp.shape(value) != ():
                raise ValueError(
                    f"{name}: expected loss_fn to return scalars, got {entry!r} as "
                    f"{describe(value)}"
                )
        return loss, metrics

    compute = jax.value_and_grad(loss_and_metrics, has_aux=True)
    parts = min(accumulate, count_samples(name, batch))
    if parts == 1:
        (_, metrics), gradients = compute(state.params, batch, key)
    else:
        metrics, gradients = _accumulate(compute, state.params, batch, key, parts)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.key, state.step + 1), metrics


def count_samples(name: str, data: Batch) -> int:
    """The length of the first axis that all arrays of a pytree share."""
    leaves = jax.tree.leaves_with_path(data)
    lengths = {
        jax.tree_util.keystr(path): np.shape(leaf)[0] if np.ndim(leaf) else None
        for path, leaf in leaves
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        found = ", ".join(f"{path or 'it'} has {length}" for path, length in lengths.items())
        raise ValueError(
            f"{name}: expected arrays with the same number of samples along their first axes; "
            f"{found or 'there are no arrays'}"
        )
    (samples,) = set(lengths.values())
    if not samples:
        raise ValueError(f"{name}: expected at least one sample, got none")
    return int(samples)


def check_at_least_one(name: str, argument: str, count: int) -> int:
    """Returns a count, which must be an integer >= 1."""
    if (count := check_count(name, argument, count)) < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {count}")
    return count


def _loop(
    body: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Batch,
    start: int | Array,
    stop: int | Array,
) -> tuple[TrainState, Metrics]:
    """Takes the steps `start` to `stop`, and stores the metrics of each."""
    shapes = jax.eval_shape(lambda: body(state, jax.tree.map(lambda a: a[0], batches))[1])
    count = jax.tree.leaves(batches)[0].shape[0]
    stored = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), shapes)

    def once(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, stored = carry
        batch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), batches)
        state, metrics = _alone(body, state, batch)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), stored, metrics)

    stepped: tuple[TrainState, Metrics] = lax.fori_loop(start, stop, once, (state, stored))
    return stepped


def _alone(
    body: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step, as a loop of one pass whose length XLA does not know.

    XLA compiles the body of a loop by itself, and thus in the same way wherever the step stands.
    Fused with what is around it, a sum may be rounded in another way.
    """
    shapes = jax.eval_shape(lambda: body(state, batch)[1])
    metrics = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    one = (state.step >= 0).astype(jnp.int32)
    stepped: tuple[TrainState, Metrics] = lax.fori_loop(
        0, one, lambda _, carry: body(carry[0], batch), (state, metrics)
    )
    return stepped


def _accumulate(
    compute: Callable[..., Any], params: Params, batch: Batch, key: Array, parts: int
) -> tuple[Metrics, Params]:
    """Metrics and gradients, averaged over the samples; the last part may be smaller."""
    samples = count_samples("make_step", batch)
    size = -(-samples // parts)
    full = samples // size

    def weighted(i: int | Array, part: Batch, weight: float) -> Any:
        (_, metrics), gradients = compute(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a: a * weight, (metrics, gradients))

    def add(total: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, weighted(*numbered, size / samples)), None

    stacked = jax.tree.map(lambda a: a[: full * size].reshape(full, size, *a.shape[1:]), batch)
    first = jax.tree.map(lambda a: a[0], stacked)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(weighted, 0, first, 1.0))
    total, _ = lax.scan(add, zeros, (jnp.arange(full), stacked))
    if rest := samples - full * size:
        part = jax.tree.map(lambda a: a[full * size :], batch)
        last = weighted(full, part, rest / samples)
        total = jax.tree.map(jnp.add, total, last)
    averages: tuple[Metrics, Params] = total
    return averages


def check_arguments(
    name: str, loss_fn: LossFn, optimizer: "optax.GradientTransformation", accumulate: int
) -> StepArguments:
    """Returns the checked arguments of `make_step`."""
    if not callable(loss_fn):
        raise TypeError(
            f"{name}: expected loss_fn to be a function (params, batch, key) -> loss, "
            f"got {describe(loss_fn)}"
        )
    _check_optimizer(name, optimizer)
    return StepArguments(loss_fn, optimizer, check_at_least_one(name, "accumulate", accumulate))


def _check_optimizer(name: str, optimizer: "optax.GradientTransformation") -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{name}: expected optimizer to be an optax optimizer, got {describe(optimizer)}"
        )


def own(state: TrainState) -> TrainState:
    """A copy that can be donated: no two arrays share memory, no dtype is weak."""
    own: TrainState = jax.tree.map(
        lambda a: jnp.array(a, dtype=jnp.asarray(a).dtype, copy=True), state
    )
    return own
