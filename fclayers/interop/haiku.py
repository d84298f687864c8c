"""Weights from and to Haiku."""

from collections.abc import Mapping
from typing import Any

from fclayers.interop._layers import (
    Layout,
    read_in_out,
    read_layers,
    write_in_out,
    write_layers,
)

_LAYOUT = Layout("w", "b", read_in_out, write_in_out)


def from_haiku(params: Mapping[str, Any]) -> Any:
    """Takes over the layers of a Haiku model.

    Args:
        params: What `hk.transform(...).init` returns, `{"mlp/~/linear_0": {"w": ..., "b": ...}}`,
            or the innermost dict of one layer.

    Returns:
        A dict from the same names to `LinearParams` (of `hk.Linear`) or `ConvParams` (of
        `hk.ConvND`); one layer if `params` is one's. Arrays are copies.

    Raises:
        TypeError: `params` is not a mapping.
        ValueError: Entries do not make up fully connected layers and convolutions; the message
            names all of them.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = {"mlp/~/linear_0": {"w": jnp.ones((5, 10)), "b": jnp.zeros(10)}}
        >>> fc.from_haiku(params)["mlp/~/linear_0"].weight.shape
        (5, 10)
    """
    return read_layers("from_haiku", params, _LAYOUT)


def to_haiku(params: Any) -> dict[str, Any]:
    """Gives layers to a Haiku model.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of them, whose names are joined
            by slashes.

    Returns:
        A dict from names to dicts of NumPy arrays `w` and `b`; one such dict for one layer.

    Raises:
        TypeError: Something in `params` is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> fc.to_haiku({"linear": layer})["linear"]["w"].shape
        (5, 10)
    """
    modules: dict[str, Any] = {}
    for (*path, part), array in write_layers("to_haiku", params, _LAYOUT).items():
        module = modules.setdefault("/".join(map(str, path)), {}) if path else modules
        module[part] = array
    return modules
