"""Weights from and to Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fclayers._checks import describe
from fclayers.interop._layers import (
    Layout,
    nest,
    read_in_out,
    read_layers,
    write_in_out,
    write_layers,
)

_LAYOUT = Layout("kernel", "bias", read_in_out, write_in_out)


def from_keras(weights: Mapping[str, Any]) -> Any:
    """Takes over the layers of a Keras model.

    Args:
        weights: `{variable.path: variable for variable in model.variables}`, or a mapping
            of `kernel` and `bias` for one layer. A kernel in Keras's channels-last format.

    Returns:
        Dicts, nested as the paths are, with `LinearParams` (of `Dense`) or `ConvParams` (of
        `ConvND`): `model/dense/kernel` is in `["model"]["dense"]`. Arrays are copies.

    Raises:
        TypeError: `weights` is not a mapping.
        ValueError: Entries do not make up fully connected layers and convolutions; the message
            names all of them.

    Example:
        >>> import numpy as np
        >>> import fclayers as fc
        >>> weights = {"model/dense/kernel": np.ones((5, 10)), "model/dense/bias": np.zeros(10)}
        >>> fc.from_keras(weights)["model"]["dense"].weight.shape
        (5, 10)
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"from_keras: expected a mapping of paths to arrays, got {describe(weights)}"
        )
    paths = {tuple(path.split("/")): array for path, array in weights.items()}
    return read_layers("from_keras", nest("from_keras", paths), _LAYOUT)


def to_keras(params: Any) -> dict[str, np.ndarray]:
    """Gives layers to a Keras model.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of them.

    Returns:
        A dict of NumPy arrays by path, for `variable.assign(arrays[variable.path])` with every
        variable of the model.

    Raises:
        TypeError: Something in `params` is no layer.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> sorted(fc.to_keras({"model": {"dense": layer}}))
        ['model/dense/bias', 'model/dense/kernel']
    """
    arrays = write_layers("to_keras", params, _LAYOUT)
    return {"/".join(map(str, path)): array for path, array in arrays.items()}
