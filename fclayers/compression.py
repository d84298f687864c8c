"""What every layer of a network would weigh in another form, and what that does to its outputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from fclayers._checks import describe
from fclayers._table import format_bytes, format_table
from fclayers._tree import path_name
from fclayers.forms import Layer, LinearParams, LoraParams, LowRankParams, QuantizedParams, is_form
from fclayers.linear import apply_linear
from fclayers.mlp import apply_mlp
from fclayers.variants import low_rank, quantize, relative_difference

Form = Callable[[Layer], Layer]

DEFAULT_FORMS: Mapping[str, Form] = {
    "int8": quantize,
    "low rank, 99%": partial(low_rank, energy=0.99),
    "low rank, 90%": partial(low_rank, energy=0.9),
}


class CompressionRow(NamedTuple):
    """One layer in one form, everything else as it was.

    Attributes:
        path: The layer's path in the tree, such as `"classifier.0"`.
        form: What was done to it; `"as it is"` for the first row of a layer.
        parameters: Number of elements of the layer's arrays.
        bytes: Their size.
        flops: Multiplications and additions of the layer's products, for one row of its input.
        error: ‖y' - y‖ / ‖y‖ over all outputs y of the network.
    """

    path: str
    form: str
    parameters: int
    bytes: int
    flops: int
    error: float


class CompressionTable(NamedTuple):
    """The rows of `compression_table`; prints as a table."""

    rows: tuple[CompressionRow, ...]

    def __str__(self) -> str:
        """The table."""
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


def compression_table(
    params: Any,
    x: Any,
    *,
    fun: Callable[[Any, Any], Array] | None = None,
    forms: Mapping[str, Form] = DEFAULT_FORMS,
) -> CompressionTable:
    """Tries every layer of a network in every form: what can shrink, and what does it cost?

    Args:
        params: A layer, or any tree with layers in it.
        x: A batch of data, what `fun` takes.
        fun: The network, `fun(params, x)`. Default: `apply_linear` for one layer, `apply_mlp` for
            a sequence of layers.
        forms: Names of forms and functions that put a layer into them. Default: int8, and the
            low ranks that keep 99 % and 90 % of the energy.

    Returns:
        A `CompressionTable`: for every layer one row as it is and one for every form, in which that
        layer alone has changed.

    Raises:
        TypeError: `fun` is needed, since `params` is neither a layer nor a sequence of layers.
        ValueError: The tree has no layer, or a layer cannot be put into a form.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> x = jax.random.normal(jax.random.key(1), (32, 64))
        >>> table = fc.compression_table(mlp, x, forms={"int8": fc.quantize})
        >>> [(row.path, row.form, row.bytes) for row in table.rows]
        [('0', 'as it is', 33280), ('0', 'int8', 9216),
         ('1', 'as it is', 5160), ('1', 'int8', 1360)]
    """
    name = "compression_table"
    if fun is None:
        if is_form(params):
            fun = apply_linear
        elif isinstance(params, (tuple, list)) and all(map(is_form, params)):
            fun = apply_mlp
        else:
            raise TypeError(f"{name}: give the network as fun(params, x) for {describe(params)}")
    nodes, structure = jax.tree.flatten_with_path(params, is_leaf=is_form)
    if not any(is_form(node) for _, node in nodes):
        raise ValueError(f"{name}: found no layer in {describe(params)}")
    expected = fun(params, x)
    rows = []
    for i, (path, layer) in enumerate(nodes):
        if not is_form(layer):
            continue
        for form, change in {"as it is": None, **forms}.items():
            changed, error = layer, 0.0
            if change is not None:
                changed = change(layer)
                leaves = [node for _, node in nodes]
                leaves[i] = changed
                y = fun(jax.tree.unflatten(structure, leaves), x)
                error = relative_difference(expected, y)
            leaves_of_layer = jax.tree.leaves(changed)
            rows.append(
                CompressionRow(
                    path_name(path),
                    form,
                    sum(leaf.size for leaf in leaves_of_layer),
                    sum(leaf.nbytes for leaf in leaves_of_layer),
                    _flops(changed),
                    error,
                )
            )
    return CompressionTable(tuple(rows))


def _flops(layer: Layer) -> int:
    match layer:
        case LinearParams(weight, _) | QuantizedParams(weight, _, _):
            return 2 * weight.size
        case LowRankParams(down, up, _):
            return 2 * (down.size + up.size)
        case LoraParams(base, down, up, _):
            return _flops(base) + 2 * (down.size + up.size)
