"""Weights from and to Equinox."""

from typing import Any

import jax

from fclayers._util.checks import is_array
from fclayers._util.errors import BadType, public
from fclayers.interop._layers import (
    AnyArray,
    Layer,
    Layout,
    nest,
    read_layers,
    read_out_in,
    tree_key,
    write_layers,
    write_out_in,
)


@public
def from_equinox(module: Any) -> Any:
    """Converts the parameters of an Equinox model.

    Args:
        module: A module, or nested dicts, lists and tuples of `weight` and `bias`. Leaves that are
            not arrays, such as activation functions, are ignored.

    Returns:
        Dicts, nested as the module's fields are, with `LinearParams` (of `eqx.nn.Linear`) or
        `ConvParams` (of `eqx.nn.Conv`) in place of the layers, or a single layer. The items
        of a list have integers as keys. Arrays are copies.

    Raises:
        TypeError: `module` is a single array or holds none.
        ValueError: As in `from_torch`.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> conv = fc.init_conv(jax.random.key(0), (3, 3), 2, 8)
        >>> arrays = fc.interop.to_equinox(conv)
        >>> arrays["weight"].shape, arrays["bias"].shape
        ((8, 2, 3, 3), (8, 1, 1))
        >>> fc.interop.from_equinox({"layers": [arrays]})["layers"][0].weight.shape
        (3, 3, 2, 8)
    """
    arrays = {
        tuple(map(tree_key, path)): leaf
        for path, leaf in jax.tree.leaves_with_path(module)
        if is_array(leaf)
    }
    if () in arrays or not arrays:
        raise BadType(f"expected a module with layers, got {type(module).__name__}")
    return read_layers(nest(arrays), _LAYOUT)


@public
def to_equinox(params: Any) -> dict[Any, Any]:
    """Converts parameters to those of an Equinox model.

    Args:
        params: As in `to_torch`.

    Returns:
        Nested dicts of NumPy arrays `weight` and `bias` in Equinox's layout, for `eqx.tree_at`.

    Raises:
        TypeError: As in `to_torch`.
        ValueError: As in `to_torch`.

    Example: see `from_equinox`.
    """
    return nest(write_layers(params, _LAYOUT))


def _read(weight: AnyArray, bias: AnyArray | None) -> Layer:
    """A convolution's bias is `(out, 1, ...)`."""
    if bias is not None and bias.shape == (*weight.shape[:1], *(1,) * (weight.ndim - 2)):
        bias = bias.ravel()
    return read_out_in(weight, bias)


def _write(layer: Layer) -> tuple[AnyArray, AnyArray | None]:
    weight, bias = write_out_in(layer)
    return weight, None if bias is None else bias.reshape(-1, *(1,) * (weight.ndim - 2))


_LAYOUT = Layout("weight", "bias", _read, _write)
