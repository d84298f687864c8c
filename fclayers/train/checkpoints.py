"""Checkpoints of a run, by orbax: written in the background, checked when they are read."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fclayers._util.checks import describe
from fclayers._util.errors import BadValue
from fclayers._util.trees import path_name
from fclayers.train.history import History
from fclayers.train.state import TrainState
from fclayers.train.step import Batch

Arrays = dict[str, np.ndarray]


class Checkpoints(NamedTuple):
    """A directory of checkpoints of one run, and the thread that writes them."""

    directory: Path
    run: dict[str, str]  # what the run depends on, compared when a checkpoint is read
    manager: Any  # an orbax.checkpoint.CheckpointManager
    writer: ThreadPoolExecutor
    pending: list[Future[None]]


@contextmanager
def open_checkpoints(
    directory: str | os.PathLike[str] | None,
    state: TrainState,
    data: Batch,
    *,
    keep: int,
    **settings: int,
) -> Iterator[Checkpoints | None]:
    """Opens the checkpoints of a run, named by their steps; at the end, all of them are written.

    Without a directory there are none, which all functions here accept. State, data and settings
    describe the run.
    """
    if directory is None:
        yield None
        return
    try:
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fit: checkpoints need orbax: pip install orbax-checkpoint, or leave out checkpoint_dir"
        ) from error
    path = Path(directory).absolute()
    # Orbax's own asynchronous mode makes directories before it returns; a thread around its
    # synchronous mode costs the training loop a copy of the state and nothing else.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
        lightweight_initialize=True,
    )
    leaves = jax.tree.leaves_with_path({"data": data, "state": state})
    run = {name: str(value) for name, value in settings.items()}
    run |= {path_name(leaf_path): describe(leaf) for leaf_path, leaf in leaves}
    with (
        ocp.CheckpointManager(path, options=options) as manager,
        ThreadPoolExecutor(1, "checkpoints") as writer,
    ):
        checkpoints = Checkpoints(path, run, manager, writer, [])
        yield checkpoints
        _wait(checkpoints)


def write_checkpoint(checkpoints: Checkpoints | None, state: TrainState, history: History) -> None:
    """Writes a copy of a state and a history in the background, after the checkpoint before it.

    Raises an `OSError` if that one could not be written.
    """
    if checkpoints is not None:
        _wait(checkpoints)
        arrays = _pack(state, history)
        future = checkpoints.writer.submit(_write, checkpoints, int(state.step), arrays)
        checkpoints.pending.append(future)


def last_checkpoint(checkpoints: Checkpoints | None) -> str:
    """The path of the newest finished checkpoint, or `none`, once all are written."""
    if checkpoints is not None:
        for future in checkpoints.pending:
            future.exception()
        if steps := checkpoints.manager.all_steps():
            return str(checkpoints.directory / str(max(steps)))
    return "none"


def read_checkpoint(
    checkpoints: Checkpoints | None, like: TrainState, steps_per_epoch: int
) -> tuple[TrainState, History]:
    """The newest undamaged state, on the devices of `like`, and history; or `like` and no history.

    A damaged checkpoint is renamed, so that it is not found again, and reported by a warning.
    """
    start = like, History({}, {}, steps_per_epoch)
    if checkpoints is None:
        return start
    for step in sorted(checkpoints.manager.all_steps(), reverse=True):
        path = checkpoints.directory / str(step)
        try:
            arrays, then = _read(checkpoints.manager, step)
        except Exception as error:  # Damaged files make orbax raise nearly anything.
            aside = _free_path(path.with_name(f"damaged-{step}"))
            path.rename(aside)
            warnings.warn(
                f"fit: the checkpoint {path} is damaged and is now {aside}; the one before it is "
                f"used. The reason: {type(error).__name__}: {error!s:.500}",
                stacklevel=4,
            )
            checkpoints.manager.reload()
            continue
        now = checkpoints.run
        changes = [
            f"{key} was {then.get(key)}, is {now.get(key)}"
            for key in {**then, **now}
            if then.get(key) != now.get(key)
        ]
        if changes:
            raise BadValue("\n  ".join([f"{path} is of another run:", *changes]))
        return _unpack(arrays, like, steps_per_epoch)
    return start


def _wait(checkpoints: Checkpoints) -> None:
    while checkpoints.pending:
        checkpoints.pending.pop().result()


def _write(checkpoints: Checkpoints, step: int, arrays: Arrays) -> None:
    import orbax.checkpoint as ocp

    about = {
        "run": checkpoints.run,
        "arrays": [[name, array.dtype.name, array.shape] for name, array in arrays.items()],
        "digest": _digest(arrays, checkpoints.run),
    }
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(_numbered(arrays)), about=ocp.args.JsonSave(about)
    )
    try:
        if not checkpoints.manager.save(step, args=args):
            raise FileExistsError(f"there is a checkpoint of step {step} or a later one")
    except Exception as error:  # TensorStore reports a full disk as a ValueError.
        raise OSError(
            f"fit: the checkpoint of step {step} could not be written to {checkpoints.directory}; "
            f"the last good checkpoint is {last_checkpoint(checkpoints._replace(pending=[]))}. "
            f"The reason: {type(error).__name__}: {error!s:.500}"
        ) from error


def _read(manager: Any, step: int) -> tuple[Arrays, dict[str, str]]:
    import orbax.checkpoint as ocp

    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    arrays = {name: np.empty(shape, jnp.dtype(dtype)) for name, dtype, shape in about["arrays"]}
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(_numbered(arrays)))
    stored = manager.restore(step, args=args)["arrays"]
    arrays = {
        name: np.asarray(stored.get(f"{i:05}", empty))
        for i, (name, empty) in enumerate(arrays.items())
    }
    if _digest(arrays, about["run"]) != about["digest"]:
        raise ValueError("its contents are not those that were written")
    return arrays, about["run"]


def _numbered(arrays: Arrays) -> Arrays:
    """Numbers in place of names; without empty arrays, whose shapes say all and orbax refuses."""
    return {f"{i:05}": array for i, array in enumerate(arrays.values()) if array.size}


def _digest(arrays: Arrays, run: dict[str, str]) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _free_path(path: Path) -> Path:
    """The path, with a number behind it if it is taken."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return path if not path.exists() else next(name for name in numbered if not name.exists())


def _pack(state: TrainState, history: History) -> Arrays:
    """Copies of all arrays of a state and a history, by names."""
    arrays = {
        f"state{jax.tree_util.keystr(path)}": np.array(
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    arrays |= {f"steps/{name}": values for name, values in history.steps.items()}
    return arrays | {f"epochs/{name}": values for name, values in history.epochs.items()}


def _unpack(arrays: Arrays, like: TrainState, steps_per_epoch: int) -> tuple[TrainState, History]:
    def restore(path: tuple[Any, ...], leaf: Array) -> Any:
        values = arrays[f"state{jax.tree_util.keystr(path)}"]
        if _is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(values), impl=jax.random.key_impl(leaf))
        # A copy, since the memory of NumPy's must not be donated.
        return jnp.array(jax.device_put(values, leaf.sharding), copy=True)

    def named(prefix: str) -> Arrays:
        return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}

    history = History(named("steps/"), named("epochs/"), steps_per_epoch)
    return jax.tree.map_with_path(restore, like), history


def _is_key(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
