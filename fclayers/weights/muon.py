"""The axes of weights for Muon."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fclayers._util.trees import is_layer
from fclayers.weights.form import is_matrix, layer_shapes, map_axes

if TYPE_CHECKING:  # optax takes longer to import than all of fclayers.
    from optax.contrib import MuonDimensionNumbers  # type: ignore[import-untyped]


def muon_dimension_numbers(params: PyTree) -> PyTree:
    """Tells Muon which axes of the arrays of layers are inputs and outputs.

    Layers with several input or output axes, convolutions, low-rank factors and blocks are
    orthogonalized as matrices; biases, scales and magnitudes are left to Adam.

    Args:
        params: Any tree of parameters.

    Returns:
        The same tree of `optax.contrib.MuonDimensionNumbers`, and `None` for arrays that are not
        matrices of a layer, for `optax.contrib.muon(muon_weight_dimension_numbers=...)`.

    Example:
        >>> import jax
        >>> import optax
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), (7, 7, 512), 128)
        >>> numbers = fc.muon_dimension_numbers(params)
        >>> numbers.weight, numbers.bias
        (MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,)), None)
        >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)
        >>> state = optimizer.init(params)

    Source: `Jordan et al. 2024, Muon <https://kellerjordan.github.io/posts/muon/>`_.
    """
    from optax.contrib import MuonDimensionNumbers

    def numbers(array: Array, names: list[str]) -> "MuonDimensionNumbers | None":
        if not is_matrix(names) or not jnp.issubdtype(array.dtype, jnp.inexact):
            return None
        sides = (
            tuple(i for i, name in enumerate(names) if name == side)
            for side in (("in" if "in" in names else "rank"), ("out" if "out" in names else "rank"))
        )
        return MuonDimensionNumbers(*sides)

    def of_node(node: PyTree) -> PyTree:
        if not is_layer(node):
            return None
        in_ndim = len(layer_shapes(node)[0])
        return node._replace(weight=map_axes(numbers, node.weight, in_ndim), bias=None)

    return jax.tree.map(of_node, params, is_leaf=is_layer)
