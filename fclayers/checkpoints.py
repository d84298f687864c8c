"""Checkpoints of a training run, by orbax: written beside it, checked when they are read."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


class Checkpoints(NamedTuple):
    """A directory of checkpoints, and the thread that writes them."""

    directory: Path
    manager: Any
    writer: ThreadPoolExecutor
    pending: list[Future[None]]


@contextmanager
def open_checkpoints(directory: str | os.PathLike[str], keep: int) -> Iterator[Checkpoints]:
    """Opens a directory, which is made if it is not there, and waits for its writer at the end.

    Args:
        directory: Where the checkpoints are, one directory each, named by its step.
        keep: How many of them are kept, the newest.

    Raises:
        ModuleNotFoundError: The `orbax-checkpoint` package is missing.
    """
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
    with (
        ThreadPoolExecutor(1, "checkpoints") as writer,
        ocp.CheckpointManager(path, options=options) as manager,
    ):
        checkpoints = Checkpoints(path, manager, writer, [])
        try:
            yield checkpoints
        finally:
            # An error of the run itself is the one to see; a finished run has waited already.
            for future in checkpoints.pending:
                future.exception()


def write_checkpoint(
    checkpoints: Checkpoints, step: int, arrays: Arrays, run: Mapping[str, str]
) -> None:
    """Writes a checkpoint in the background, after the one before it.

    Args:
        checkpoints: From `open_checkpoints`.
        step: Names the checkpoint.
        arrays: What it holds. Nobody may write to them any more.
        run: What the run depends on; `read_checkpoint` compares it.

    Raises:
        OSError: The checkpoint before this one could not be written.
    """
    wait_for_checkpoint(checkpoints)
    checkpoints.pending.append(checkpoints.writer.submit(_write, checkpoints, step, arrays, run))


def wait_for_checkpoint(checkpoints: Checkpoints) -> None:
    """Returns when everything is written.

    Raises:
        OSError: It could not be; names the directory and the last good checkpoint.
    """
    while checkpoints.pending:
        checkpoints.pending.pop().result()


def last_checkpoint(checkpoints: Checkpoints) -> str:
    """The path of the newest finished checkpoint, or `none`, once all are written."""
    for future in checkpoints.pending:
        future.exception()
    steps = checkpoints.manager.all_steps()
    return str(checkpoints.directory / str(max(steps))) if steps else "none"


def read_checkpoint(checkpoints: Checkpoints, run: Mapping[str, str]) -> Arrays | None:
    """Reads the newest checkpoint that is whole.

    A damaged one is renamed, so that it is not found again, and reported by a warning.

    Args:
        checkpoints: From `open_checkpoints`.
        run: What the run depends on.

    Returns:
        The arrays by their names, or `None` if there is no whole checkpoint.

    Raises:
        ValueError: The checkpoint is one of another run.
    """
    manager = checkpoints.manager
    for step in sorted(manager.all_steps(), reverse=True):
        path = checkpoints.directory / str(step)
        try:
            arrays, then = _read(manager, step)
        except Exception as error:  # Damaged files make orbax raise nearly anything.
            aside = _free_path(path.with_name(f"damaged-{step}"))
            path.rename(aside)
            warnings.warn(
                f"fit: the checkpoint {path} is damaged and is now {aside}; the one before it is "
                f"used. The reason: {type(error).__name__}: {error!s:.500}",
                stacklevel=3,
            )
            manager.reload()
            continue
        if then != run:
            changes = [
                f"{key} was {then.get(key)}, is {run.get(key)}"
                for key in {**then, **run}
                if then.get(key) != run.get(key)
            ]
            raise ValueError("\n  ".join([f"fit: {path} is of another run:", *changes]))
        return arrays
    return None


def _write(checkpoints: Checkpoints, step: int, arrays: Arrays, run: Mapping[str, str]) -> None:
    import orbax.checkpoint as ocp

    about = {
        "run": dict(run),
        "arrays": [[name, array.dtype.name, array.shape] for name, array in arrays.items()],
        "digest": _digest(arrays, run),
    }
    # Orbax refuses empty arrays; their shapes say all there is to know.
    stored = {f"{i:05}": array for i, array in enumerate(arrays.values()) if array.size}
    try:
        saved = checkpoints.manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(stored), about=ocp.args.JsonSave(about)
            ),
        )
        if not saved:
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
    places = {
        f"{i:05}": np.empty(shape, jnp.dtype(dtype))
        for i, (_, dtype, shape) in enumerate(about["arrays"])
        if np.prod(shape, dtype=int)
    }
    stored = manager.restore(
        step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(places))
    )["arrays"]
    arrays = {
        name: np.asarray(stored.get(f"{i:05}", np.empty(shape, jnp.dtype(dtype))))
        for i, (name, dtype, shape) in enumerate(about["arrays"])
    }
    if _digest(arrays, about["run"]) != about["digest"]:
        raise ValueError("its contents are not those that were written")
    return arrays, about["run"]


def _digest(arrays: Arrays, run: Mapping[str, str]) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps(dict(run), sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _free_path(path: Path) -> Path:
    """The path, with a number behind it if it is taken."""
    names: Sequence[Path] = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())
