"""Weights from and to Flax, Linen and NNX."""

from collections.abc import Mapping
from typing import Any

from fclayers._util.errors import public
from fclayers.interop._layers import Layout, nest, read_layers, write_layers

_LAYOUT = Layout("kernel", "bias")


@public
def from_flax(params: Mapping[str, Any]) -> Any:
    """Converts the parameters of a Flax model.

    Args:
        params: Linen's `variables["params"]`, NNX's `nnx.state(model, nnx.Param)` or its pure dict,
            or a part of them: nested dicts of `kernel` and `bias`.

    Returns:
        The same nesting with `LinearParams` (of `Dense`, `nnx.Linear`) or `ConvParams` (of `Conv`)
        in place of the innermost dicts; a single layer if `params` is one. Arrays are copies.

    Raises:
        TypeError: `params` is not a mapping.
        ValueError: As in `from_torch`.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> params = fc.interop.to_flax({"Dense_0": layer})
        >>> params["Dense_0"]["kernel"].shape
        (5, 10)
        >>> fc.interop.from_flax(params)["Dense_0"].weight.shape
        (5, 10)
    """
    return read_layers(params, _LAYOUT)


@public
def to_flax(params: Any) -> dict[Any, Any]:
    """Converts parameters to those of a Flax model.

    Args:
        params: As in `to_torch`.

    Returns:
        Nested dicts of NumPy arrays: for Linen the value of the key `params`, for NNX the argument
        of `nnx.replace_by_pure_dict`. Indices of tuples and lists are integer keys, as in NNX.

    Raises:
        TypeError: As in `to_torch`.
        ValueError: As in `to_torch`.

    Example: see `from_flax`.
    """
    return nest(write_layers(params, _LAYOUT))
