"""Summary tables of parameter trees."""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fclayers._table import format_bytes, format_table


def summarize(params: Any) -> None:
    """Prints a table of the arrays in a pytree: what they are and what they weigh.

    Args:
        params: Any pytree of arrays, or of the `jax.ShapeDtypeStruct`s that `jax.eval_shape`
            gives, so that a model needs no memory to be summarized. Leaves that are no arrays, such
            as functions, are left out.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> shapes = jax.eval_shape(lambda key: fc.init_mlp(key, [64, 128, 10]), jax.random.key(0))
        >>> fc.summarize(shapes)
        path        kind    shape      dtype    parameters     bytes   share
        --------------------------------------------------------------------
        [0].weight  Linear  (64, 128)  float32       8,192  32.0 KiB   85.2%
        [0].bias    Linear  (128,)     float32         128     512 B    1.3%
        [1].weight  Linear  (128, 10)  float32       1,280   5.0 KiB   13.3%
        [1].bias    Linear  (10,)      float32          10      40 B    0.1%
        --------------------------------------------------------------------
        total                                        9,610  37.5 KiB  100.0%
    """
    rows = [
        _row(params, path, leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))
    ]
    parameters, size = sum(row.parameters for row in rows), sum(row.size for row in rows)
    cells = [
        (
            row.path,
            row.kind,
            str(row.shape),
            row.dtype,
            f"{row.parameters:,}",
            format_bytes(row.size),
            f"{row.parameters / max(parameters, 1):.1%}",
        )
        for row in rows
    ]
    header = ("path", "kind", "shape", "dtype", "parameters", "bytes", "share")
    share = f"{1 if parameters else 0:.1%}"
    total = ("total", "", "", "", f"{parameters:,}", format_bytes(size), share)
    print(format_table(header, cells, total=total, numeric=4))


class _Row(NamedTuple):
    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    size: int


def _row(tree: Any, path: Any, leaf: Any) -> _Row:
    shape, dtype = jnp.shape(leaf), jax.dtypes.result_type(leaf)
    count = prod(shape)
    return _Row(
        jax.tree_util.keystr(path),
        _kind(tree, path),
        shape,
        str(dtype),
        count,
        count * dtype.itemsize,
    )


def _kind(tree: Any, path: Any) -> str:
    """The innermost NamedTuple or other class on the path: `Linear` for `LinearParams`."""
    kind = "array"
    for key in path:
        if type(tree) not in (dict, list, tuple):
            kind = type(tree).__name__.removesuffix("Params")
        match key:
            case jax.tree_util.GetAttrKey(name):
                tree = getattr(tree, name)
            case jax.tree_util.DictKey(entry) | jax.tree_util.SequenceKey(entry):
                tree = tree[entry]
            case _:
                break
    return kind
