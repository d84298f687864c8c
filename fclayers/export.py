"""Networks with their weights in one file, to be served by JAX alone."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fclayers._checks import check_array, describe
from fclayers._files import write_file


def export_apply(
    fn: Callable[[Any, Any], Any],
    params: Any,
    example: Any,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes `x -> fn(params, x)`, weights included, to a file that JAX runs without this library.

    The file holds StableHLO for batches of any size. `load_exported` reads it, and so does
    `jax.export.deserialize`. It appears under its name when it is complete.

    Args:
        fn: The network, from parameters and a batch to an array or a tree of them, all with the
            batch as their leading axis. It is traced for one row and mapped over the rows, so a
            row of its results can depend on the same row of `x` only.
        params: The parameters, which become constants of the file.
        example: A batch: any tree of arrays, or of shapes as `jax.eval_shape` gives them, that have
            the batch as their leading axis. What counts is everything but its size.
        path: The file. Its folder must exist; a file that is there is replaced.
        platforms: Where the file will run: some of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`, none of
            which has to be at hand. Default: where JAX runs now.

    Raises:
        ImportError: The `flatbuffers` package is missing.
        TypeError: An entry of `example` is not an array, or a parameter only a shape.
        ValueError: `example` or a result has no batch axis, `fn` does not take batches of any size,
            a tree has nodes that are neither tuples, lists nor dicts, or a platform is unknown.
        OSError: The file cannot be written. What was there before is unharmed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> path = Path(tempfile.mkdtemp(), "mlp.jax")
        >>> fc.export_apply(fc.apply_mlp, mlp, jnp.ones((1, 64)), path)
        >>> fc.load_exported(path)(jnp.ones((32, 64))).shape
        (32, 10)

    Source: `jax.export <https://docs.jax.dev/en/latest/export/export.html>`_.
    """
    name = "export_apply"
    if platforms is not None and not _are_platforms(platforms):
        raise ValueError(f"{name}: platforms must be some of {_PLATFORMS}, got {platforms!r}")
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{name}: a parameter has a shape {leaf.shape}, but no values")
    row = _row_of(name, example)
    _check_results(name, fn, params, row)
    host_params = jax.device_get(params)

    def apply_to_row(x: Any) -> Any:
        constants = jax.tree.map(
            lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, host_params
        )
        results = fn(constants, jax.tree.map(lambda a: a[None], x))
        return jax.tree.map(lambda a: a[0], results)

    (size,) = export.symbolic_shape("b")
    exported = export.export(jax.jit(jax.vmap(apply_to_row)), platforms=platforms)(
        _batch_of(row, size)
    )
    try:
        data = bytes(exported.serialize())
    except ValueError as error:
        raise ValueError(f"{name}: the function cannot be written: {error}") from error
    # FlatBuffers find their contents from the front, so jax.export does not see what follows.
    write_file(Path(path), data + hashlib.sha256(data).digest())


def load_exported(path: str | os.PathLike[str]) -> Callable[[Any], Any]:
    """Reads a function that `export_apply` wrote.

    Args:
        path: The file.

    Returns:
        The function of `x`, a tree like `example` with a batch of any size from 1 on. It is jitted:
        every size is compiled when it first comes. It has no derivatives and cannot be vmapped.

    Raises:
        ImportError: The `flatbuffers` package is missing.
        OSError: The file cannot be read.
        ValueError: The file is truncated, damaged, or not by `export_apply`. When the function is
            called: `x` does not have the structure, shapes and dtypes of `example`, or JAX runs on
            a platform that the file is not for.

    Example: see `export_apply`.
    """
    name = "load_exported"
    written = Path(path).read_bytes()
    data, digest = written[:-_DIGEST_SIZE], written[-_DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{name}: {path} is truncated, damaged, or not by export_apply")
    exported = export.deserialize(bytearray(data))
    (expected,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

    @jax.jit
    def apply(x: Any) -> Any:
        _check_batch(f"{name}: {path}", expected, x)
        return exported.call(x)  # type: ignore[no-untyped-call]

    return apply


_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_DIGEST_SIZE = hashlib.sha256().digest_size


def _are_platforms(names: Any) -> bool:
    return not isinstance(names, str) and len(names) > 0 and {*names} <= {*_PLATFORMS}


def _row_of(function: str, example: Any) -> Any:
    """The shapes and dtypes of one row of the batch."""
    sizes = set()
    for path, leaf in jax.tree.leaves_with_path(example):
        entry = f"example{jax.tree_util.keystr(path)}"
        check_array(function, entry, leaf)
        if not leaf.shape:
            raise ValueError(f"{function}: {entry} must have a batch axis, got {describe(leaf)}")
        sizes.add(leaf.shape[0])
    if len(sizes) != 1:
        raise ValueError(
            f"{function}: expected arrays in example with one batch size, got {sorted(sizes)}"
        )
    return jax.tree.map(lambda a: _abstract(a.shape[1:], a.dtype), example)


def _batch_of(row: Any, size: Any) -> Any:
    return jax.tree.map(lambda a: _abstract((size, *a.shape), a.dtype), row)


def _check_results(function: str, fn: Callable[[Any, Any], Any], params: Any, row: Any) -> None:
    """Raises unless `fn` takes batches of one row and of two, and gives as many results."""
    for size in (1, 2):
        try:
            results = jax.eval_shape(lambda x: fn(params, x), _batch_of(row, size))
        except Exception as error:
            raise ValueError(
                f"{function}: fn must take a batch of any size, with {size} it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        for path, leaf in jax.tree.leaves_with_path(results):
            if leaf.shape[:1] != (size,):
                raise ValueError(
                    f"{function}: the results must have the batch as their leading axis, for a "
                    f"batch of {size} result{jax.tree_util.keystr(path)} is {describe(leaf)}"
                )


def _check_batch(function: str, expected: Any, x: Any) -> None:
    structures = [str(jax.tree.structure(tree)) for tree in (expected, x)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{function}: expected x to have the structure {structures[0]}, got {structures[1]}"
        )
    sizes = set()
    for (path, wanted), leaf in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(x), strict=True
    ):
        sizes.update(leaf.shape[:1])
        if leaf.shape[1:] != wanted.shape[1:] or not leaf.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"{function}: expected x{jax.tree_util.keystr(path)} to be {describe(wanted)}, "
                f"got {describe(leaf)}"
            )
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"{function}: expected one batch size b >= 1, got {sorted(sizes)}")


def _abstract(shape: Sequence[Any], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]
