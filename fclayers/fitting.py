"""Training to the end: epochs with evaluation and progress, resumed to the last bit."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fclayers._checks import check_count, describe
from fclayers.checkpoints import (
    Arrays,
    last_checkpoint,
    open_checkpoints,
    read_checkpoint,
    wait_for_checkpoint,
    write_checkpoint,
)
from fclayers.training import (
    Batch,
    LossFn,
    Params,
    TrainState,
    check_arguments,
    check_at_least_one,
    count_samples,
    epoch_order,
    own,
    run_steps,
)

if TYPE_CHECKING:  # optax takes longer to import than all of fclayers.
    import optax  # type: ignore[import-untyped]

T = TypeVar("T")

# The host looks at the losses about this often; in between, the device works alone.
_SECONDS_PER_PIECE = 0.5


class History(NamedTuple):
    """What training measured."""

    steps: Arrays  # every metric of `loss_fn` and the loss, float arrays (steps,)
    epochs: Arrays  # their means as `train_...` and all that `eval_fn` returned, (epochs,)
    steps_per_epoch: int

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws every metric over the epochs and writes the picture, by matplotlib.

        Args:
            path: Where the picture goes, such as `history.png`. Its folder is made.
        """
        from matplotlib.figure import Figure

        names = list(self.steps) + [
            name
            for name in self.epochs
            if name not in self.steps and name.removeprefix("train_") not in self.steps
        ]
        figure = Figure(figsize=(5.5 * max(1, len(names)), 3.8), layout="constrained")
        for axes, name in zip(
            figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=True
        ):
            if name in self.steps:
                values = self.steps[name]
                axes.plot(
                    np.arange(1, len(values) + 1) / self.steps_per_epoch,
                    values,
                    color="tab:blue",
                    alpha=0.3,
                    linewidth=0.8,
                    label="step",
                )
            for entry, color in ((f"train_{name}", "tab:blue"), (name, "tab:orange")):
                values = self.epochs.get(entry, np.empty(0))
                if values.size:
                    label = "epoch" if entry != name else "evaluation"
                    axes.plot(np.arange(1, len(values) + 1), values, ".-", color=color, label=label)
            axes.set(xlabel="epoch", title=name)
            axes.grid(alpha=0.3)
            axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def fit(
    state: TrainState,
    data: Batch,
    loss_fn: LossFn,
    optimizer: "optax.GradientTransformation",
    *,
    epochs: int,
    batch_size: int,
    shuffle: bool = True,
    accumulate: int = 1,
    chunk_size: int | None = None,
    eval_fn: Callable[[Params], dict[str, Any]] | None = None,
    patience: int | None = None,
    monitor: str = "train_loss",
    mode: str = "min",
    callbacks: Sequence[Callable[[int, TrainState, dict[str, float]], None]] = (),
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    keep: int = 3,
    progress: bool = True,
) -> tuple[TrainState, History]:
    """Trains, evaluates, writes checkpoints, and goes on from the newest one.

    The steps are those of `make_epoch`. Neither `chunk_size` nor checkpoints nor an interruption
    change a bit of the results.

    Args:
        state: From `init_state`. It is copied, not donated.
        data: As in `make_epoch`, in NumPy arrays, memory maps or JAX arrays.
        loss_fn: As in `make_step`.
        optimizer: An optax optimizer.
        epochs: Epochs in total, those before `state` or a checkpoint included.
        batch_size: Samples per step.
        shuffle: As in `make_epoch`.
        accumulate: As in `make_step`.
        chunk_size: Samples that are on the device at a time, rounded down to whole batches. The
            next chunk is prepared while the device works on one, so that there is memory for
            three. Default: all of them, and a copy in the order of the epoch.
        eval_fn: Called with the parameters after every epoch; returns a dict of numbers.
        patience: Training stops after so many epochs without a new best value of `monitor`.
        monitor: A name among the values that `eval_fn` returns, or a metric's mean over the
            training epoch, such as `train_loss`.
        mode: Whether the best value is the least, `"min"`, or the greatest, `"max"`.
        callbacks: Functions `callback(epoch, state, metrics)`, called after every epoch, the first
            of which is 0, with the newest values of `History.epochs`. The state is donated to the
            next step; what shall stay of it must be copied. After an interruption, epochs behind
            the checkpoint are called for again.
        checkpoint_dir: Where the checkpoints are. If there is one already, training goes on
            after it.
        checkpoint_every: Steps between checkpoints. There is one at the end in any case.
        keep: How many checkpoints are kept, the newest.
        progress: Whether to show a progress bar, by the `tqdm` package.

    Returns:
        The last state, and the `History` from the first step on.

    Raises:
        FloatingPointError: The loss or a parameter became NaN. The message names the step and the
            last good checkpoint; none is written after it.
        ModuleNotFoundError: Checkpoints need orbax-checkpoint, the progress bar needs tqdm.
        OSError: A checkpoint could not be written. The message names the last good one.
        TypeError: `loss_fn` or `optimizer` is not what it should be.
        ValueError: An argument is out of range, or the checkpoints are of another run.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import optax
        >>> import fclayers as fc
        >>> x = np.random.default_rng(0).standard_normal((100, 3), np.float32)
        >>> data = {"x": x, "y": x.sum(1, keepdims=True)}
        >>> def loss_fn(params, batch, key):
        ...     return ((fc.apply_linear(params, batch["x"]) - batch["y"]) ** 2).mean()
        >>> optimizer = optax.adam(0.1)
        >>> params = fc.init_linear(jax.random.key(0), 3, 1)
        >>> state = fc.init_state(params, optimizer, jax.random.key(1))
        >>> state, history = fc.fit(
        ...     state, data, loss_fn, optimizer, epochs=30, batch_size=32, progress=False
        ... )
        >>> history.steps["loss"].shape, bool(history.epochs["train_loss"][-1] < 0.01)
        ((120,), True)
    """
    name = "fit"
    arguments = check_arguments(name, loss_fn, optimizer, accumulate)
    check_count(name, "epochs", epochs)
    for argument, count in (
        ("batch_size", batch_size),
        ("checkpoint_every", checkpoint_every),
        ("keep", keep),
        *([] if chunk_size is None else [("chunk_size", chunk_size)]),
        *([] if patience is None else [("patience", patience)]),
    ):
        check_at_least_one(name, argument, count)
    if mode not in ("min", "max"):
        raise ValueError(f"{name}: mode must be 'min' or 'max', got {mode!r}")
    samples = count_samples(name, data)
    per_epoch = -(-samples // batch_size)
    total = epochs * per_epoch
    state = own(state)
    steps: dict[str, list[np.ndarray[Any, Any]]] = {}
    evaluations: dict[str, list[float]] = {}

    with ExitStack() as stack:
        checkpoints = None
        if checkpoint_dir is not None:
            checkpoints = stack.enter_context(open_checkpoints(checkpoint_dir, keep))
            run = _describe_run(state, data, batch_size, shuffle, accumulate)
            if (arrays := read_checkpoint(checkpoints, run)) is not None:
                state = _unpack_state(state, arrays)
                steps = {key: [array] for key, array in _named("steps/", arrays).items()}
                found = _named("epochs/", arrays)
                evaluations = {key: array.tolist() for key, array in found.items()}
        step = saved = int(state.step)

        def history() -> History:
            for key, pieces in steps.items():
                steps[key] = [np.concatenate(pieces)]
            return History(
                {key: pieces[0] for key, pieces in steps.items()},
                {key: np.array(values) for key, values in evaluations.items()},
                per_epoch,
            )

        def last_good() -> str:
            return "none" if checkpoints is None else last_checkpoint(checkpoints)

        def save() -> None:
            nonlocal saved
            _check_params(state, last_good)
            if checkpoints is not None and step != saved:
                write_checkpoint(checkpoints, step, _pack(state, history()), run)
                saved = step

        def stopped() -> bool:
            values = evaluations.get(monitor, [])
            return step >= total or (
                patience is not None
                and step % per_epoch == 0
                and _epochs_since_best(values, mode) >= patience
            )

        bar = stack.enter_context(_show_progress(samples * epochs)) if progress else None
        if bar is not None:
            bar.update(_samples_before(step, samples, batch_size))
        loader = _load(state.key, data, samples, batch_size, shuffle, chunk_size, step, total)
        if chunk_size is not None:
            loader = _prefetch(loader)
        chunks = stack.enter_context(closing(loader))
        piece = 1
        while not stopped():
            first, last, batches = next(chunks)
            while step < last:
                count = min(last - step, checkpoint_every - step % checkpoint_every, piece)
                began = time.perf_counter()
                state, stored = run_steps(
                    state,
                    batches,
                    jnp.int32(step - first),
                    jnp.int32(step - first + count),
                    name=name,
                    arguments=arguments,
                )
                done = slice(step - first, step - first + count)
                metrics = {key: np.array(values)[done] for key, values in stored.items()}
                if count == piece:
                    slow = time.perf_counter() - began > _SECONDS_PER_PIECE
                    piece = max(1, piece // 2) if slow else 2 * piece
                _check_losses(metrics["loss"], step, last_good)
                for key, values in metrics.items():
                    steps.setdefault(key, []).append(values)
                if bar is not None:
                    before = _samples_before(step, samples, batch_size)
                    bar.update(_samples_before(step + count, samples, batch_size) - before)
                    shown = {key: f"{values.mean():.4g}" for key, values in metrics.items()}
                    shown |= {
                        key: f"{values[-1]:.4g}"
                        for key, values in evaluations.items()
                        if not key.startswith("train_")
                    }
                    epoch = f"{-(-(step + count) // per_epoch)}/{epochs}"
                    bar.set_postfix({"epoch": epoch, **shown}, refresh=False)
                step += count
                if step % per_epoch == 0:
                    _evaluate(state, history(), evaluations, eval_fn, samples, batch_size)
                    if patience is not None and monitor not in evaluations:
                        raise ValueError(
                            f"{name}: monitor must be one of {', '.join(map(repr, evaluations))}, "
                            f"got {monitor!r}"
                        )
                    newest = {key: values[-1] for key, values in evaluations.items()}
                    for callback in callbacks:
                        callback(step // per_epoch - 1, state, newest)
                if step % checkpoint_every == 0:
                    save()
        save()
        if checkpoints is not None:
            wait_for_checkpoint(checkpoints)
        return state, history()


def _load(
    key: Array,
    data: Batch,
    samples: int,
    batch_size: int,
    shuffle: bool,
    chunk_size: int | None,
    step: int,
    total: int,
) -> Generator[tuple[int, int, Batch], None, None]:
    """From `step` on: first step, last step + 1 and stacked batches of every chunk on the device.

    The smaller batch at the end of an epoch is a chunk of its own.
    """
    full, per_epoch = samples // batch_size, -(-samples // batch_size)
    in_chunk = full if chunk_size is None else min(full, max(1, chunk_size // batch_size))
    data = jax.tree.map(jnp.asarray if chunk_size is None else np.asarray, data)

    def take(rows: np.ndarray[Any, Any], size: int) -> Batch:
        if chunk_size is None:
            return _take(data, jnp.asarray(rows), size=size)
        return jax.tree.map(lambda a: jax.device_put(a[rows].reshape(-1, size, *a.shape[1:])), data)

    key = jnp.copy(key)  # The training loop donates the other one.
    for start in range(step // per_epoch * per_epoch, total, per_epoch):
        order = np.arange(samples)
        if shuffle:
            at_start = TrainState(None, None, key, jnp.int32(start))
            order = np.asarray(epoch_order(at_start, samples, batch_size=batch_size))
        for i in range(0, full, in_chunk or 1):
            first, last = start + i, start + min(i + in_chunk, full)
            if last > step:
                rows = order[i * batch_size : min(i + in_chunk, full) * batch_size]
                # The last chunk has the others' shape too; what it has too much is never used.
                rows = np.pad(rows, (0, in_chunk * batch_size - len(rows)))
                yield first, last, take(rows, batch_size)
        if full < per_epoch:
            rows = order[full * batch_size :]
            yield start + full, start + per_epoch, take(rows, len(rows))


@partial(jax.jit, static_argnames="size")
def _take(data: Batch, rows: Array, *, size: int) -> Batch:
    return jax.tree.map(lambda a: a[rows].reshape(-1, size, *a.shape[1:]), data)


def _prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "prefetch") as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


def _check_losses(losses: np.ndarray[Any, Any], step: int, last_good: Callable[[], str]) -> None:
    if np.isnan(losses).any():
        raise FloatingPointError(
            f"fit: the loss is NaN at step {step + int(np.isnan(losses).argmax())} (the first is "
            f"step 0); the last good checkpoint is {last_good()}"
        )


def _check_params(state: TrainState, last_good: Callable[[], str]) -> None:
    """A loss can be finite and its gradient NaN; the loss of the next step shows it too late."""
    for path, leaf in jax.tree.leaves_with_path(state.params):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and np.isnan(np.asarray(leaf)).any():
            raise FloatingPointError(
                f"fit: params{jax.tree_util.keystr(path)} has NaN after step "
                f"{int(state.step) - 1} (the first is step 0); the last good checkpoint is "
                f"{last_good()}"
            )


def _evaluate(
    state: TrainState,
    history: History,
    evaluations: dict[str, list[float]],
    eval_fn: Callable[[Params], dict[str, Any]] | None,
    samples: int,
    batch_size: int,
) -> None:
    """Appends an epoch's values."""
    per_epoch = history.steps_per_epoch
    sizes = np.full(per_epoch, batch_size)
    sizes[-1] = samples - (per_epoch - 1) * batch_size
    found = {}
    for key, values in history.steps.items():
        last = values[-per_epoch:].astype(np.float64)
        found[f"train_{key}"] = np.average(last, weights=sizes[-len(last) :])
    if eval_fn is not None:
        found |= eval_fn(state.params)
    if evaluations and set(evaluations) != set(found):
        raise ValueError(
            f"fit: expected eval_fn to return the same names after every epoch; they were "
            f"{sorted(evaluations)}, and are {sorted(found)}"
        )
    for key, value in found.items():
        evaluations.setdefault(key, []).append(float(value))


def _epochs_since_best(values: Sequence[float], mode: str) -> int:
    if not values:
        return 0
    best = np.nanargmin(values) if mode == "min" else np.nanargmax(values)
    return len(values) - 1 - int(best)


def _samples_before(step: int, samples: int, batch_size: int) -> int:
    epoch, position = divmod(step, -(-samples // batch_size))
    return epoch * samples + position * batch_size


def _show_progress(total: int) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fit: the progress bar needs tqdm: pip install tqdm, or pass progress=False"
        ) from error
    return tqdm(total=total, unit=" samples", unit_scale=True)


def _describe_run(
    state: TrainState, data: Batch, batch_size: int, shuffle: bool, accumulate: int
) -> dict[str, str]:
    """What must be as it was for a run to go on."""
    run = {"batch_size": f"{batch_size}", "shuffle": f"{shuffle}", "accumulate": f"{accumulate}"}
    arrays = {"data": data, "state": state}
    for path, leaf in jax.tree.leaves_with_path(arrays):
        run[jax.tree_util.keystr(path)] = describe(leaf)
    return run


def _is_key(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _pack(state: TrainState, history: History) -> Arrays:
    """Copies of all arrays of a state and a history, by names."""
    arrays = {
        f"state{jax.tree_util.keystr(path)}": np.array(
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    arrays |= {f"steps/{key}": values for key, values in history.steps.items()}
    return arrays | {f"epochs/{key}": values for key, values in history.epochs.items()}


def _unpack_state(like: TrainState, arrays: Arrays) -> TrainState:
    """The state in `arrays`, on the devices of `like`."""

    def restore(path: Any, leaf: Array) -> Array:
        values = arrays[f"state{jax.tree_util.keystr(path)}"]
        if _is_key(leaf):
            key: Array = jax.random.wrap_key_data(
                jnp.asarray(values), impl=jax.random.key_impl(leaf)
            )
            return key
        # A copy, since the memory of NumPy's must not be donated.
        return jnp.array(jax.device_put(values, leaf.sharding), copy=True)

    state: TrainState = jax.tree.map_with_path(restore, like)
    return state


def _named(prefix: str, arrays: Arrays) -> Arrays:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
