"""Training to the end: epochs with evaluation and progress, resumed to the last bit."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue, public
from fclayers._util.progress import progress_bar
from fclayers._util.trees import path_name
from fclayers.train.checkpoints import (
    Checkpoints,
    last_checkpoint,
    open_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from fclayers.train.epoch import load_chunks, prefetch, run_chunks
from fclayers.train.history import EvalFn, History, Record, record_from
from fclayers.train.state import Optimizer, TrainState, own
from fclayers.train.step import Batch, LossFn, Run, check_at_least_one, count_samples, make_body


@public
def fit(
    state: TrainState,
    data: Batch,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    epochs: int,
    batch_size: int,
    shuffle: bool = True,
    accumulate: int = 1,
    chunk_size: int | None = None,
    eval_fn: EvalFn | None = None,
    patience: int | None = None,
    monitor: str = "train_loss",
    mode: str = "min",
    callbacks: Sequence[Callable[[int, TrainState, dict[str, float]], None]] = (),
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    keep: int = 3,
    progress: bool = True,
) -> tuple[TrainState, History]:
    """Trains, evaluates and writes checkpoints; resumes from the newest one.

    The steps are those of `make_epoch`. Neither `chunk_size` nor checkpoints nor an interruption
    change a bit of the results.

    Args:
        state: From `init_state`. It is copied, not donated.
        data: As in `make_epoch`, in NumPy arrays, memory maps or JAX arrays.
        loss_fn: As in `make_step`.
        optimizer: As in `make_step`.
        epochs: Epochs in total, including those before `state` or a checkpoint.
        batch_size: As in `make_epoch`.
        shuffle: As in `make_epoch`.
        accumulate: As in `make_step`.
        chunk_size: Samples that are on the device at a time, rounded down to whole batches. The
            next chunk is prepared while the device works on one, so there must be memory for
            three. Default: all samples, and a copy in the epoch's order.
        eval_fn: Called with the parameters after every epoch; returns a dict of numbers.
        patience: Training stops after so many epochs without a new best value of `monitor`.
        monitor: A name among the values that `eval_fn` returns, or a metric's mean over the
            training epoch, such as `train_loss`.
        mode: Whether the best value is the least, `"min"`, or the greatest, `"max"`.
        callbacks: Functions `callback(epoch, state, metrics)`, called after every epoch, the first
            of which is 0, with the newest values of `History.epochs`. The state is donated to the
            next step: copy anything you keep. A resumed run calls them again for the epochs after
            the checkpoint.
        checkpoint_dir: Where the checkpoints are. Training resumes from the newest.
        checkpoint_every: Steps between checkpoints. The last step always has one.
        keep: How many checkpoints are kept, the newest.
        progress: Whether to show a progress bar, if `tqdm` is installed.

    Returns:
        The last state, and the `History` from the first step on.

    Raises:
        FloatingPointError: The loss or a parameter became NaN. The message names the step and the
            last good checkpoint; none is written after it.
        ModuleNotFoundError: `checkpoint_dir` requires the `orbax-checkpoint` package.
        OSError: A checkpoint could not be written. The message names the last good one.
        TypeError: As in `make_step`.
        ValueError: As in `make_step`, an argument is out of range, or the checkpoints are of
            another run.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import optax
        >>> import fclayers as fc
        >>> x = np.random.default_rng(0).standard_normal((100, 3), np.float32)
        >>> def loss_fn(params, x, key):
        ...     return ((fc.apply_linear(params, x) - x.sum(1, keepdims=True)) ** 2).mean()
        >>> optimizer = optax.adam(0.1)
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.train.init_state(params, optimizer, jax.random.key(1))
        >>> state, history = fc.train.fit(
        ...     state, x, loss_fn, optimizer, epochs=30, batch_size=32, progress=False
        ... )
        >>> history.steps["loss"].shape, bool(history.epochs["train_loss"][-1] < 0.01)
        ((120,), True)
    """
    body = make_body(loss_fn, optimizer, accumulate)
    check_count("epochs", epochs)
    counts = {"batch_size": batch_size, "checkpoint_every": checkpoint_every, "keep": keep}
    counts |= {} if chunk_size is None else {"chunk_size": chunk_size}
    counts |= {} if patience is None else {"patience": patience}
    for argument, count in counts.items():
        check_at_least_one(argument, count)
    if mode not in ("min", "max"):
        raise BadValue(f"mode must be 'min' or 'max', got {mode!r}")
    run = Run(epochs, count_samples(data), batch_size)
    state = own(state)
    settings = {"batch_size": batch_size, "shuffle": shuffle, "accumulate": accumulate}

    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            open_checkpoints(checkpoint_dir, state, data, keep=keep, **settings)
        )
        state, history = read_checkpoint(checkpoints, state, run.steps_per_epoch)
        record, step = record_from(history, run), int(state.step)
        best = np.nanargmin if mode == "min" else np.nanargmax

        def stopped() -> bool:
            values = record.epochs.get(monitor)
            impatient = patience is not None and values and len(values) > patience + best(values)
            return step >= run.total or bool(impatient and step % run.steps_per_epoch == 0)

        total, done = run.samples_before(run.total), run.samples_before(step)
        bar = stack.enter_context(progress_bar(total, unit=" samples", initial=done, show=progress))
        loaded = load_chunks(
            data, run, state.key, shuffle=shuffle, chunk_size=chunk_size, start=step
        )
        chunks = stack.enter_context(closing(loaded if chunk_size is None else prefetch(loaded)))
        pieces = run_chunks(state, chunks, body, stop_every=checkpoint_every)

        while not stopped():
            before = step
            step, state, metrics = next(pieces)
            _check_losses(metrics["loss"], before, checkpoints)
            record.add_steps(metrics)
            epoch_ends = step % run.steps_per_epoch == 0
            newest = record.add_epoch(state.params, eval_fn) if epoch_ends else {}
            _show(bar, record, metrics, before, step)
            if epoch_ends:
                if patience is not None and monitor not in newest:
                    names = ", ".join(map(repr, newest))
                    raise BadValue(f"monitor must be one of {names}, got {monitor!r}")
                for callback in callbacks:
                    callback(step // run.steps_per_epoch - 1, state, newest)
            if step % checkpoint_every == 0 or stopped():
                _check_params(state, checkpoints)
                write_checkpoint(checkpoints, state, record.history())
        return state, record.history()


def _show(
    bar: Any, record: Record, metrics: Mapping[str, np.ndarray], before: int, step: int
) -> None:
    """Advances the bar to a step, with the metrics since the one before and of the last epoch."""
    run = record.run
    bar.update(run.samples_before(step) - run.samples_before(before))
    shown = {"epoch": f"{-(-step // run.steps_per_epoch)}/{run.epochs}"}
    shown |= {name: f"{values.mean():.4g}" for name, values in metrics.items()}
    shown |= {
        name: f"{values[-1]:.4g}"
        for name, values in record.epochs.items()
        if not name.startswith("train_")
    }
    bar.set_postfix(shown, refresh=False)


def _check_losses(losses: np.ndarray, step: int, checkpoints: Checkpoints | None) -> None:
    if np.isnan(losses).any():
        first = step + int(np.isnan(losses).argmax())
        raise _diverged(f"the loss is NaN at step {first}", checkpoints)


def _check_params(state: TrainState, checkpoints: Checkpoints | None) -> None:
    """A loss can be finite and its gradient NaN; the loss of the next step shows it too late."""
    for path, leaf in jax.tree.leaves_with_path({"params": state.params}):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isnan(np.asarray(leaf)).any():
            after = int(state.step) - 1
            raise _diverged(f"{path_name(path)} has NaN after step {after}", checkpoints)


def _diverged(what: str, checkpoints: Checkpoints | None) -> FloatingPointError:
    return FloatingPointError(
        f"fit: {what} (the first is step 0); "
        f"the last good checkpoint is {last_checkpoint(checkpoints)}"
    )
