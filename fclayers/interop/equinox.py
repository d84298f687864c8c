"""Weights from and to Equinox."""

from typing import Any

import jax
from jaxtyping import Array

from fclayers._tree import tree_key
from fclayers.forms import LinearParams
from fclayers.interop._layers import (
    Layer,
    Layout,
    nest,
    read_layers,
    read_out_in,
    write_layers,
    write_out_in,
)


def from_equinox(module: Any) -> Any:
    """Takes over the layers of an Equinox model.

    Args:
        module: A module, or nested dicts, lists and tuples of `weight` and `bias`. Leaves that are
            no arrays, such as activation functions, are left out.

    Returns:
        Dicts, nested as the module's fields are, with `LinearParams` (of `eqx.nn.Linear`) or
        `ConvParams` (of `eqx.nn.Conv`) in place of the layers; one layer for one layer. The items
        of a list have integers as keys. Arrays are copies.

    Raises:
        TypeError: `module` is a single array or holds none.
        ValueError: Arrays do not make up fully connected layers and convolutions; the message
            names all of them.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> linear = {"weight": jnp.ones((10, 5)), "bias": jnp.zeros(10)}
        >>> fc.from_equinox({"layers": [linear]})["layers"][0].weight.shape
        (5, 10)
    """
    arrays = {
        tuple(map(tree_key, path)): leaf
        for path, leaf in jax.tree.leaves_with_path(module)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    if () in arrays or not arrays:
        raise TypeError(f"from_equinox: expected a module with layers, got {type(module).__name__}")
    return read_layers("from_equinox", nest("from_equinox", arrays), _LAYOUT)


def to_equinox(params: Any) -> dict[Any, Any]:
    """Gives layers to an Equinox model.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of them.

    Returns:
        Nested dicts of NumPy arrays `weight` and `bias` in Equinox's layout, to be put into a
        module by `eqx.tree_at`.

    Raises:
        TypeError: Something in `params` is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> arrays = fc.to_equinox(fc.init_conv(jax.random.key(0), (3, 3), 2, 8))
        >>> arrays["weight"].shape, arrays["bias"].shape
        ((8, 2, 3, 3), (8, 1, 1))
    """
    return nest("to_equinox", write_layers("to_equinox", params, _LAYOUT))


def _read(weight: Array, bias: Array | None) -> Layer:
    """A convolution's bias is `(out, 1, ...)`."""
    if bias is not None and bias.shape == (*weight.shape[:1], *(1,) * (weight.ndim - 2)):
        bias = bias.ravel()
    return read_out_in(weight, bias)


def _write(layer: Layer) -> tuple[Array, Array | None]:
    weight, bias = write_out_in(layer)
    if bias is not None and not isinstance(layer, LinearParams):
        bias = bias.reshape(-1, *(1,) * (weight.ndim - 2))
    return weight, bias


_LAYOUT = Layout("weight", "bias", _read, _write)
