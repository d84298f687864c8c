"""Tables of parameters, of the forms that layers could have, and of the errors."""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fclayers._util.checks import describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.tables import format_bytes, format_table
from fclayers._util.trees import Path, is_layer, layers_in, path_name
from fclayers.linear import LinearParams, apply_linear
from fclayers.mlp import apply_mlp
from fclayers.weights.form import dense, is_matrix, layer_shapes, map_axes
from fclayers.weights.int8 import quantize
from fclayers.weights.lowrank import low_rank

Form = Callable[[PyTree], PyTree]

DEFAULT_FORMS: Mapping[str, Form] = {
    "int8": quantize,
    "low rank, 99%": partial(low_rank, energy=0.99),
    "low rank, 90%": partial(low_rank, energy=0.9),
}


class SummaryRow(NamedTuple):
    """One array of a tree.

    Attributes:
        path: Its path, such as `"0.weight"`.
        kind: The innermost `NamedTuple` or other class that holds it, such as `"Linear"`.
        shape: Its shape.
        dtype: Its dtype.
        parameters: Number of its elements.
        bytes: Their size.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int


class Summary(NamedTuple):
    """The rows of `summarize`; prints as a table.

    Attributes:
        rows: One per array.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def parameters(self) -> int:
        """Number of elements of all arrays."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(row.bytes for row in self.rows)

    def __repr__(self) -> str:
        total = max(self.parameters, 1)
        cells = [
            (
                *row[:4],
                f"{row.parameters:,}",
                format_bytes(row.bytes),
                f"{row.parameters / total:.1%}",
            )
            for row in self.rows
        ]
        header = ("path", "kind", "shape", "dtype", "parameters", "bytes", "share")
        share = f"{self.parameters / total:.1%}"
        last = ("total", "", "", "", f"{self.parameters:,}", format_bytes(self.bytes), share)
        return format_table(header, cells, total=last, numeric=4)


def summarize(params: PyTree) -> Summary:
    """Lists the arrays of a pytree with their shapes, dtypes and sizes.

    Args:
        params: Any pytree of arrays, or of the `jax.ShapeDtypeStruct` leaves that `jax.eval_shape`
            returns, so that a model needs no memory to be summarized. Other leaves, such as
            functions, are left out.

    Returns:
        A `Summary`, which prints as a table.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc.summarize(jax.eval_shape(lambda: fc.init_mlp(jax.random.key(0), [64, 128, 10])))
        path      kind    shape      dtype    parameters     bytes   share
        ------------------------------------------------------------------
        0.weight  Linear  (64, 128)  float32       8,192  32.0 KiB   85.2%
        0.bias    Linear  (128,)     float32         128     512 B    1.3%
        1.weight  Linear  (128, 10)  float32       1,280   5.0 KiB   13.3%
        1.bias    Linear  (10,)      float32          10      40 B    0.1%
        ------------------------------------------------------------------
        total                                      9,610  37.5 KiB  100.0%
    """

    def row(path: Path, leaf: PyTree) -> SummaryRow:
        shape, dtype = jnp.shape(leaf), jax.dtypes.result_type(leaf)
        count = prod(shape)
        kind = _kind(params, path)
        return SummaryRow(path_name(path), kind, shape, str(dtype), count, count * dtype.itemsize)

    leaves = jax.tree.leaves_with_path(params)
    return Summary(
        tuple(
            row(path, leaf)
            for path, leaf in leaves
            if hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))
        )
    )


class CompressionRow(NamedTuple):
    """One layer in one form, all others unchanged.

    Attributes:
        path: The layer's path in the tree, such as `"classifier.0"`.
        form: Name of the form; `"unchanged"` for the first row of a layer.
        parameters: Number of elements of the layer's arrays.
        bytes: Their size.
        flops: Multiplications and additions of the layer's products, per row of its input or per
            position of a convolution.
        error: ‖y' - y‖ / ‖y‖ over all outputs y of the network.
    """

    path: str
    form: str
    parameters: int
    bytes: int
    flops: int
    error: float


class CompressionTable(NamedTuple):
    """The rows of `compression_table`; prints as a table.

    Attributes:
        rows: One per layer and form.
    """

    rows: tuple[CompressionRow, ...]

    def __repr__(self) -> str:
        header = ("layer", "form", "parameters", "bytes", "FLOPs", "output error")
        cells = [
            (
                row.path or "(the layer)",
                row.form,
                f"{row.parameters:,}",
                format_bytes(row.bytes),
                f"{row.flops:,}",
                f"{row.error:.2%}",
            )
            for row in self.rows
        ]
        return format_table(header, cells, numeric=2)


@public
def compression_table(
    params: PyTree,
    x: PyTree,
    *,
    fun: Callable[[PyTree, PyTree], Array] | None = None,
    forms: Mapping[str, Form] = DEFAULT_FORMS,
) -> CompressionTable:
    """Compares the forms of every layer of a network, one layer at a time.

    Args:
        params: A layer, or any tree with layers in it.
        x: A batch of data.
        fun: The network, `fun(params, x)`. Default: `apply_linear` for one fully connected layer,
            `apply_mlp` for a sequence of them.
        forms: Names of forms and functions that convert a layer. Default: int8, and the low ranks
            that keep 99 % and 90 % of the energy.

    Returns:
        A `CompressionTable`: for every layer one row unchanged and one per form, in which that
        layer alone is converted.

    Raises:
        TypeError: `fun` is missing and `params` is neither a layer nor a sequence of layers.
        ValueError: The tree has no layer, or a layer cannot be converted.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> x = jax.random.normal(jax.random.key(1), (32, 64))
        >>> table = fc.compression_table(mlp, x, forms={"int8": fc.quantize})
        >>> [(row.path, row.form, row.bytes) for row in table.rows]
        [('0', 'unchanged', 33280), ('0', 'int8', 9216),
         ('1', 'unchanged', 5160), ('1', 'int8', 1360)]
    """
    if fun is None:
        if isinstance(params, LinearParams):
            fun = apply_linear
        elif isinstance(params, (tuple, list)) and all(
            isinstance(layer, LinearParams) for layer in params
        ):
            fun = apply_mlp
        else:
            raise BadType(f"give the network as fun(params, x) for {describe(params)}")
    nodes, structure = jax.tree.flatten_with_path(params, is_leaf=is_layer)
    if not any(is_layer(node) for _, node in nodes):
        raise BadValue(f"found no layer in {describe(params)}")
    expected = fun(params, x)
    rows = []
    for i, (path, layer) in enumerate(nodes):
        if not is_layer(layer):
            continue
        rows.append(_compression_row(path, "unchanged", layer, 0.0))
        for form, convert in forms.items():
            leaves = [node for _, node in nodes]
            leaves[i] = converted = convert(layer)
            error = _relative_difference(expected, fun(jax.tree.unflatten(structure, leaves), x))
            rows.append(_compression_row(path, form, converted, error))
    return CompressionTable(tuple(rows))


@public
def reconstruction_error(params: PyTree, other: PyTree) -> dict[str, float]:
    """Returns the relative error of every layer's weight after a change of form.

    Args:
        params: A layer, or any tree with layers in it.
        other: The same tree with some layers in other forms.

    Returns:
        For every layer's path, `‖W' - W‖ / ‖W‖` in the Frobenius norm; 0 where both are 0.

    Raises:
        ValueError: The trees do not have the same layers.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> errors = fc.reconstruction_error(mlp, fc.quantize(mlp))
        >>> {path: round(error, 3) for path, error in errors.items()}
        {'0': 0.004, '1': 0.004}
    """
    before, after = (
        {path: _dense(layer) for path, layer in layers_in(tree).items()} for tree in (params, other)
    )
    shapes = [{path: w.shape for path, w in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        raise BadValue(f"expected the same layers, got {shapes[0]} and {shapes[1]}")
    return {path: _relative_difference(before[path], after[path]) for path in before}


def _relative_difference(expected: ArrayLike, actual: ArrayLike) -> float:
    """Returns `‖actual - expected‖ / ‖expected‖`, 0 where both are 0."""
    expected, actual = (np.asarray(array, np.complex128) for array in (expected, actual))
    difference = float(np.linalg.norm(actual - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0


def _compression_row(path: Path, form: str, layer: PyTree, error: float) -> CompressionRow:
    leaves = jax.tree.leaves(layer)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return CompressionRow(path_name(path), form, count, size, _flops(layer), error)


def _flops(layer: PyTree) -> int:
    counts: list[int] = []

    def count(array: Array, names: list[str]) -> None:
        counts.append(2 * array.size * is_matrix(names))

    map_axes(count, layer.weight, len(layer_shapes(layer)[0]))
    return sum(counts)


def _dense(layer: PyTree) -> Array:
    return dense(layer.weight, len(layer_shapes(layer)[0]))


def _kind(tree: PyTree, path: Path) -> str:
    """The innermost `NamedTuple` or other class on the path: `Linear` for `LinearParams`."""
    kind = "array"
    for key in path:
        if type(tree) not in (dict, list, tuple):
            kind = type(tree).__name__.removesuffix("Params")
        match key:
            case GetAttrKey(name):
                tree = getattr(tree, name)
            case DictKey(entry) | SequenceKey(entry):
                tree = tree[entry]
            case _:
                break
    return kind
