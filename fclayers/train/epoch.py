"""An epoch on the device: its order, its steps, and chunks of it that are loaded meanwhile."""

import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from fclayers._util.checks import check_count, check_key, describe
from fclayers._util.errors import BadType, public
from fclayers._util.jit import jit
from fclayers.train.state import Optimizer, TrainState
from fclayers.train.step import (
    Batch,
    Body,
    LossFn,
    Run,
    Step,
    Stepped,
    check_at_least_one,
    count_samples,
    isolated,
    make_body,
    stack_batches,
)

T = TypeVar("T")

# The host looks at the losses about this often; in between, the device works alone.
_SECONDS_PER_PIECE = 0.5


@public
def make_epoch(
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    batch_size: int,
    shuffle: bool = True,
    accumulate: int = 1,
) -> Step:
    """Makes a jitted function that does the steps of a whole epoch on the device.

    To the last bit it is the loop of `make_step` over the batches in the order of `epoch_order`.

    Args:
        loss_fn: As in `make_step`.
        optimizer: As in `make_step`.
        batch_size: Samples per step. What is left at the end is a step with a smaller batch.
        shuffle: Whether every epoch has a new order, or that of the data.
        accumulate: As in `make_step`.

    Returns:
        A function `epoch(state, data)` that returns the state after the epoch, and the metrics of
        its steps, each of shape `(steps,)`. `data` is a pytree of arrays with the samples along
        their first axes; a copy of it in the epoch's order is in memory meanwhile. The state is
        donated.

    Raises:
        TypeError: As in `make_step`.
        ValueError: As in `make_step`, or `batch_size` is less than 1.

    Example: see `make_step`.
    """
    body = make_body(loss_fn, optimizer, accumulate)
    size = check_at_least_one("batch_size", batch_size)

    def epoch(state: TrainState, data: Batch) -> Stepped:
        samples = count_samples(data)
        if shuffle:
            number = state.step // Run(1, samples, size).steps_per_epoch
            order = epoch_order(state.key, number, samples)
            data = jax.tree.map(lambda a: a[order], data)
        pieces = []
        for batches in stack_batches(data, size):
            state, metrics = run_steps(body, state, batches, 0, count_samples(batches))
            pieces.append(metrics)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)

    return jax.jit(public(epoch, "make_epoch"), donate_argnames="state")


@jit("num_samples")
def epoch_order(
    key: PRNGKeyArray, epoch: int | Int[Array, ""], num_samples: int
) -> Int[Array, " num_samples"]:
    """Returns the order in which an epoch takes the samples, a function of key and epoch alone.

    Args:
        key: The key of the `TrainState`.
        epoch: The number of the epoch; the first is 0.
        num_samples: Samples of an epoch.

    Returns:
        A permutation of the samples' indices, int32. Step `i` of the epoch takes the entries from
        `i * batch_size` on, `batch_size` of them or as many as are left.

    Raises:
        TypeError: `key` is not a random key, or `epoch` is not an integer.
        ValueError: `num_samples` is not an integer >= 0.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> sorted(fc.train.epoch_order(jax.random.key(1), 0, 5).tolist())
        [0, 1, 2, 3, 4]
    """
    check_key(key)
    if np.ndim(epoch) or not jnp.issubdtype(jnp.result_type(epoch), jnp.integer):
        raise BadType(f"expected epoch to be an integer, got {describe(epoch)}")
    samples = check_count("num_samples", num_samples)
    order_key, _ = jax.random.split(key)
    # `jax.random.permutation` sorts twice, which was a seventh of a small network's epoch.
    draws = jax.random.bits(jax.random.fold_in(order_key, epoch), (samples,))
    indices = jnp.arange(samples, dtype=jnp.int32)
    _, order = lax.sort((draws, indices), num_keys=1, is_stable=False)
    return order


def run_steps(
    body: Step, state: TrainState, batches: Batch, start: int | Array, stop: int | Array
) -> Stepped:
    """Does the steps with the stacked batches `start` to `stop`; the other metrics are zero."""
    shapes = jax.eval_shape(lambda: body(state, jax.tree.map(lambda a: a[0], batches))[1])
    count = count_samples(batches)
    stored = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), shapes)

    def once(i: Array, carry: Stepped) -> Stepped:
        state, stored = carry
        batch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), batches)
        state, metrics = isolated(body, state, batch)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), stored, metrics)

    stepped: Stepped = lax.fori_loop(start, stop, once, (state, stored))
    return stepped


class Chunk(NamedTuple):
    """Stacked batches of the steps `start` to `stop`, on the device; there may be more in it."""

    start: int
    stop: int
    batches: Batch


def load_chunks(
    data: Batch, run: Run, key: PRNGKeyArray, *, shuffle: bool, chunk_size: int | None, start: int
) -> Generator[Chunk, None, None]:
    """Makes the chunks from the step `start` on: an epoch's, or `chunk_size` samples at a time.

    The smaller batch at the end of an epoch is a chunk of its own.
    """
    key = jnp.copy(key)  # The state's is donated.
    data = jax.tree.map(jnp.asarray if chunk_size is None else np.asarray, data)

    def take(rows: np.ndarray) -> Batch:
        if chunk_size is None:
            return _take(data, jnp.asarray(rows))
        return jax.tree.map(lambda a: jax.device_put(a[rows]), data)

    for epoch in range(start // run.steps_per_epoch, run.epochs):
        order = np.arange(run.num_samples)
        if shuffle:
            order = np.asarray(epoch_order(key, epoch, run.num_samples))
        first = epoch * run.steps_per_epoch
        for rows in stack_batches(order, run.batch_size):
            count = min(len(rows), max(1, (chunk_size or len(order)) // run.batch_size))
            for i in range(0, len(rows), count):
                stop = first + min(i + count, len(rows))
                if stop > start:
                    # The last chunk has the others' shape too; what it has too much is never used.
                    chosen = rows[np.arange(i, i + count) % len(rows)]
                    yield Chunk(first + i, stop, take(chosen))
            first += len(rows)


@jax.jit
def _take(data: Batch, rows: Array) -> Batch:
    return jax.tree.map(lambda a: a[rows], data)


def prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "prefetch") as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


_run_steps = jax.jit(run_steps, static_argnames="body", donate_argnames="state")


def run_chunks(
    state: TrainState, chunks: Iterable[Chunk], body: Body, *, stop_every: int
) -> Generator[tuple[int, TrainState, dict[str, np.ndarray]], None, None]:
    """Does the steps of all chunks in pieces that take about `_SECONDS_PER_PIECE`.

    Yields the steps done, the state, which is donated to the next piece, and the metrics of this
    one's steps. A piece ends at every multiple of `stop_every` steps and at the end of every chunk.
    """
    step, piece = int(state.step), 1
    for chunk in chunks:
        while step < chunk.stop:
            count = min(chunk.stop - step, stop_every - step % stop_every, piece)
            start = step - chunk.start
            began = time.perf_counter()
            state, stored = _run_steps(
                body, state, chunk.batches, jnp.int32(start), jnp.int32(start + count)
            )
            metrics = {name: np.array(a)[start : start + count] for name, a in stored.items()}
            if count == piece:
                slow = time.perf_counter() - began > _SECONDS_PER_PIECE
                piece = max(1, piece // 2) if slow else 2 * piece
            step += count
            yield step, state, metrics
