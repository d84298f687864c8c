"""Weights from and to Haiku."""

from collections.abc import Mapping
from typing import Any

from fclayers._util.errors import public
from fclayers.interop._layers import Layout, read_layers, write_layers

_LAYOUT = Layout("w", "b")


@public
def from_haiku(params: Mapping[str, Any]) -> Any:
    """Converts the parameters of a Haiku model.

    Args:
        params: What `hk.transform(...).init` returns, `{"mlp/~/linear_0": {"w": ..., "b": ...}}`,
            or the innermost dict of one layer.

    Returns:
        A dict from the same names to `LinearParams` (of `hk.Linear`) or `ConvParams` (of
        `hk.ConvND`); a single layer if `params` is one. Arrays are copies.

    Raises:
        TypeError: `params` is not a mapping.
        ValueError: As in `from_torch`.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> params = fc.interop.to_haiku({"mlp/~/linear_0": layer})
        >>> params["mlp/~/linear_0"]["w"].shape
        (5, 10)
        >>> fc.interop.from_haiku(params)["mlp/~/linear_0"].weight.shape
        (5, 10)
    """
    return read_layers(params, _LAYOUT)


@public
def to_haiku(params: Any) -> dict[str, Any]:
    """Converts parameters to those of a Haiku model.

    Args:
        params: As in `to_torch`. Nested names are joined by slashes.

    Returns:
        A dict from names to dicts of NumPy arrays `w` and `b`; for a single layer, such a dict.

    Raises:
        TypeError: As in `to_torch`.
        ValueError: As in `to_torch`.

    Example: see `from_haiku`.
    """
    modules: dict[str, Any] = {}
    for (*path, part), array in write_layers(params, _LAYOUT).items():
        module = modules.setdefault("/".join(map(str, path)), {}) if path else modules
        module[str(part)] = array
    return modules
