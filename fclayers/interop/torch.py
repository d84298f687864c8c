"""Weights from and to PyTorch."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fclayers._checks import check_features, describe
from fclayers.forms import LinearParams
from fclayers.interop._layers import (
    Layer,
    Layout,
    is_layer,
    nest,
    read_layers,
    read_out_in,
    write_layers,
    write_out_in,
)


def from_torch(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    flattened: tuple[int, ...] | None = None,
    bilinear: bool = False,
) -> Any:
    """Takes over the layers of a PyTorch model.

    Args:
        state_dict: `model.state_dict()`, or any mapping of PyTorch's names to arrays.
        prefix: Name of the layer or the part of the model to take; the default is all of it.
        flattened: `(C, H, W)`, or `(C, L)` or `(C, D, H, W)`: the shape, without batch, that
            PyTorch's `flatten` saw in front of a fully connected layer. The inputs of that layer,
            the only one with `C·H·W` of them, are reordered to a flattened `(H, W, C)`.
        bilinear: Whether weights of three axes belong to `nn.Bilinear`, not to `nn.Conv1d`.

    Returns:
        `LinearParams` or `ConvParams` if `prefix` names a layer, else a dict of them, nested as
        the names are: `features.0.weight` is in `["features"]["0"]`. Arrays are copies, with JAX's
        dtypes (64 bits become 32 unless `jax_enable_x64` is set).

    Raises:
        TypeError: `state_dict` is not a mapping.
        ValueError: Nothing is there, or entries do not make up fully connected layers and
            convolutions; the message names all of them. A model that has others, such as norms,
            is taken over part by part.

    Example:
        >>> import numpy as np
        >>> import fclayers as fc
        >>> state_dict = {"fc.weight": np.ones((10, 5)), "fc.bias": np.zeros(10)}
        >>> fc.from_torch(state_dict, "fc").weight.shape
        (5, 10)
        >>> sorted(fc.from_torch(state_dict))
        ['fc']
    """
    name = "from_torch"
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{name}: expected a mapping of names to arrays such as model.state_dict(), "
            f"got {describe(state_dict)}"
        )
    start = f"{prefix}." if prefix else ""
    below = {
        tuple(entry.removeprefix(start).split(".")): array
        for entry, array in state_dict.items()
        if entry.startswith(start)
    }
    if not below:
        raise ValueError(
            f"{name}: no entry starts with {start!r}; the entries are {', '.join(state_dict)}"
        )
    layers = read_layers(name, nest(name, below), _layout(name, bilinear))
    if flattened is None:
        return layers
    shape = check_features(name, "flattened", flattened)

    def reorder(layer: LinearParams) -> LinearParams:
        weight = jnp.moveaxis(layer.weight.reshape(*shape, -1), 0, -2)
        return layer._replace(weight=weight.reshape(layer.weight.shape))

    return _map_flattened(name, reorder, layers, shape)


def to_torch(
    params: Any, prefix: str = "", *, flattened: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """Gives layers to a PyTorch model.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of them. A `LinearParams` with a
            weight of three axes becomes an `nn.Bilinear`'s.
        prefix: Put in front of all names.
        flattened: As in `from_torch`: the inputs of the layer with `C·H·W` of them, flattened or
            on three axes, are reordered from `(H, W, C)` to PyTorch's `(C, H, W)`.

    Returns:
        A dict of NumPy arrays with the names of a state dict, for
        `model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})`.

    Raises:
        TypeError: Something in `params` is no layer.
        ValueError: No layer, or more than one, has the flattened inputs.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> {name: array.shape for name, array in fc.to_torch(layer, "fc").items()}
        {'fc.weight': (10, 5), 'fc.bias': (10,)}
    """
    name = "to_torch"
    if flattened is not None:
        shape = check_features(name, "flattened", flattened)
        channels, *spatial = shape

        def reorder(layer: LinearParams) -> LinearParams:
            weight = jnp.moveaxis(layer.weight.reshape(*spatial, channels, -1), -2, 0)
            return layer._replace(weight=weight.reshape(prod(shape), -1))

        params = _map_flattened(name, reorder, params, shape)
    arrays = write_layers(name, params, _layout(name, bilinear=False))
    start = (prefix,) if prefix else ()
    return {".".join(map(str, (*start, *path))): array for path, array in arrays.items()}


def _map_flattened(
    function: str, reorder: Callable[[LinearParams], LinearParams], params: Any, shape: Any
) -> Any:
    """Reorders the one fully connected layer with as many inputs as `shape` has elements."""

    def follows(layer: Any) -> bool:
        weight_shape = layer.weight.shape if isinstance(layer, LinearParams) else ()
        return prod(weight_shape[:-1]) == prod(shape) and len(weight_shape) in (2, len(shape) + 1)

    matches = sum(map(follows, jax.tree.leaves(params, is_leaf=is_layer)))
    if matches != 1:
        raise ValueError(
            f"{function}: flattened={shape} is for one fully connected layer of {prod(shape)} "
            f"inputs, but {matches} have as many; choose the layer by its name"
        )
    return jax.tree.map(
        lambda layer: reorder(layer) if follows(layer) else layer, params, is_leaf=is_layer
    )


def _layout(function: str, bilinear: bool) -> Layout:
    def read(weight: Array, bias: Array | None) -> Layer:
        if bilinear and weight.ndim == 3:
            return LinearParams(weight.transpose(1, 2, 0), bias)
        return read_out_in(weight, bias)

    def write(layer: Layer) -> tuple[Array, Array | None]:
        if isinstance(layer, LinearParams) and layer.weight.ndim == 3:
            return layer.weight.transpose(2, 0, 1), layer.bias
        if isinstance(layer, LinearParams) and layer.weight.ndim != 2:
            raise ValueError(
                f"{function}: PyTorch has no layer with a weight of shape {layer.weight.shape}; "
                "pass flattened=(C, H, W) if it follows a flatten"
            )
        return write_out_in(layer)

    return Layout("weight", "bias", read, write)
