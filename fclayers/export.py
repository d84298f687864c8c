"""Networks and their weights in one file, which JAX runs without this library."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fclayers._util.checks import check_array, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.files import write_file
from fclayers._util.trees import abstract, path_name


@public
def export_apply(
    fun: Callable[[Any, Any], Any],
    params: Any,
    example: Any,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes `x -> fun(params, x)`, weights included, to a file that JAX runs without this library.

    The file holds StableHLO for batches of any size. `load_exported` reads it, and so does
    `jax.export.deserialize`. It is written atomically.

    Args:
        fun: The network, from parameters and a batch to an array or a tree of them, all with the
            batch as their leading axis. It is traced for one row and mapped over the rows, so a
            row of its results can depend on the same row of `x` only.
        params: The parameters, which become constants of the file.
        example: A batch: any tree of arrays, or of shapes as `jax.eval_shape` gives them, that have
            the batch as their leading axis. Its size does not matter.
        path: The file. Its folder must exist; an existing file is replaced.
        platforms: The platforms on which the file will run, present or not: some of `"cpu"`,
            `"cuda"`, `"rocm"` and `"tpu"`. Default: the current one.

    Raises:
        ImportError: The `flatbuffers` package is missing.
        TypeError: An entry of `example` is not an array, or a parameter has no values.
        ValueError: `example` or a result has no batch axis, `fun` does not take batches of any
            size, a tree has nodes other than tuples, lists and dicts, or a platform is unknown.
        OSError: The file cannot be written. An existing file is not modified.

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
    if platforms is not None and (
        isinstance(platforms, str) or not platforms or not {*platforms} <= {*_PLATFORMS}
    ):
        raise BadValue(f"platforms must be some of {_PLATFORMS}, got {platforms!r}")
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise BadType(f"a parameter has a shape {leaf.shape}, but no values")
    row = _row_of(example)
    _check_results(fun, params, row)
    host_params = jax.device_get(params)

    def apply_to_row(x: Any) -> Any:
        constants = jax.tree.map(
            lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, host_params
        )
        results = fun(constants, jax.tree.map(lambda a: a[None], x))
        return jax.tree.map(lambda a: a[0], results)

    batch = _batch_of(row, *export.symbolic_shape("b"))
    exported = export.export(jax.jit(jax.vmap(apply_to_row)), platforms=platforms)(batch)
    try:
        data = bytes(exported.serialize())
    except ValueError as error:
        raise BadValue(f"the function cannot be written: {error}") from error
    # FlatBuffers are read from the front, so jax.export ignores what follows.
    write_file(Path(path), data + hashlib.sha256(data).digest())


@public
def load_exported(path: str | os.PathLike[str]) -> Callable[[Any], Any]:
    """Reads a function that `export_apply` wrote.

    Args:
        path: The file.

    Returns:
        The function of `x`, a tree like `example` with a batch of any size from 1 on. It is jitted:
        each size is compiled on first use. It has no derivatives and cannot be vmapped.

    Raises:
        ImportError: The `flatbuffers` package is missing.
        OSError: The file cannot be read.
        ValueError: The file is truncated, damaged, or not from `export_apply`. When the function is
            called: `x` does not have the structure, shapes and dtypes of `example`, or JAX runs on
            a platform that the file is not for.

    Example: see `export_apply`.
    """
    written = Path(path).read_bytes()
    data, digest = written[:-_DIGEST_SIZE], written[-_DIGEST_SIZE:]
    if hashlib.sha256(data).digest() != digest:
        raise BadValue(f"{path} is truncated, damaged, or not by export_apply")
    exported = export.deserialize(bytearray(data))
    (expected,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

    def apply(x: Any) -> Any:
        _check_batch(expected, x)
        return exported.call(x)  # type: ignore[no-untyped-call]

    return jax.jit(public(apply, f"load_exported: {path}"))


_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_DIGEST_SIZE = hashlib.sha256().digest_size


def _row_of(example: Any) -> Any:
    """The shapes and dtypes of one row of the batch."""
    sizes = set()
    for path, leaf in jax.tree.leaves_with_path({"example": example}):
        entry = path_name(path)
        check_array(entry, leaf)
        if not leaf.shape:
            raise BadValue(f"{entry} must have a batch axis, got {describe(leaf)}")
        sizes.add(leaf.shape[0])
    if len(sizes) != 1:
        raise BadValue(f"expected arrays in example with one batch size, got {sorted(sizes)}")
    return jax.tree.map(lambda a: abstract(a.shape[1:], a.dtype), example)


def _batch_of(row: Any, size: Any) -> Any:
    return jax.tree.map(lambda a: abstract((size, *a.shape), a.dtype), row)


def _check_results(fun: Callable[[Any, Any], Any], params: Any, row: Any) -> None:
    """Raises unless `fun` takes batches of one row and of two, and gives as many results."""
    for size in (1, 2):
        try:
            results = jax.eval_shape(lambda x: fun(params, x), _batch_of(row, size))
        except Exception as error:
            raise BadValue(
                f"fun must take a batch of any size, with {size} it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        for path, leaf in jax.tree.leaves_with_path({"result": results}):
            if leaf.shape[:1] != (size,):
                raise BadValue(
                    f"the results must have the batch as their leading axis, for a "
                    f"batch of {size} {path_name(path)} is {describe(leaf)}"
                )


def _check_batch(expected: Any, x: Any) -> None:
    structures = [str(jax.tree.structure(tree)) for tree in (expected, x)]
    if structures[0] != structures[1]:
        raise BadValue(f"expected x to have the structure {structures[0]}, got {structures[1]}")
    sizes = set()
    for (path, wanted), leaf in zip(
        jax.tree.leaves_with_path({"x": expected}), jax.tree.leaves(x), strict=True
    ):
        sizes.update(leaf.shape[:1])
        if leaf.shape[1:] != wanted.shape[1:] or not leaf.shape or leaf.dtype != wanted.dtype:
            raise BadValue(
                f"expected {path_name(path)} to be {describe(wanted)}, got {describe(leaf)}"
            )
    if len(sizes) != 1 or 0 in sizes:
        raise BadValue(f"expected one batch size b >= 1, got {sorted(sizes)}")
