"""Weights from and to Flax, Linen and NNX."""

from collections.abc import Mapping
from typing import Any

from fclayers.interop._layers import (
    Layout,
    nest,
    read_in_out,
    read_layers,
    write_in_out,
    write_layers,
)

_LAYOUT = Layout("kernel", "bias", read_in_out, write_in_out)


def from_flax(params: Mapping[str, Any]) -> Any:
    """Takes over the layers of a Flax model.

    Args:
        params: Linen's `variables["params"]`, NNX's `nnx.state(model, nnx.Param)`, as it is or as
            a pure dict, or a part of them: nested dicts of `kernel` and `bias`.

    Returns:
        The same nesting with `LinearParams` (of `Dense`, `nnx.Linear`) or `ConvParams` (of `Conv`)
        in place of the innermost dicts; one layer if `params` is one's. Arrays are copies.

    Raises:
        TypeError: `params` is not a mapping.
        ValueError: Entries do not make up fully connected layers and convolutions; the message
            names all of them.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = {"Dense_0": {"kernel": jnp.ones((5, 10)), "bias": jnp.zeros(10)}}
        >>> fc.from_flax(params)["Dense_0"].weight.shape
        (5, 10)
    """
    return read_layers("from_flax", params, _LAYOUT)


def to_flax(params: Any) -> dict[Any, Any]:
    """Gives layers to a Flax model.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of them.

    Returns:
        Nested dicts of NumPy arrays, for Linen what is under the key `params`, for NNX what
        `nnx.replace_by_pure_dict` takes. Indices of tuples and lists are integer keys, as in NNX.

    Raises:
        TypeError: Something in `params` is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> fc.to_flax({"Dense_0": layer})["Dense_0"]["kernel"].shape
        (5, 10)
    """
    return nest("to_flax", write_layers("to_flax", params, _LAYOUT))
