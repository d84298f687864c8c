"""Weights from and to Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fclayers._util.errors import public
from fclayers.interop._layers import Layout, check_mapping, nest, read_layers, write_layers

_LAYOUT = Layout("kernel", "bias")


@public
def from_keras(weights: Mapping[str, Any]) -> Any:
    """Converts the parameters of a Keras model.

    Args:
        weights: `{variable.path: variable for variable in model.variables}`, or a mapping
            of `kernel` and `bias` for one layer. A kernel in Keras's channels-last format.

    Returns:
        Dicts, nested as the paths are, with `LinearParams` (of `Dense`) or `ConvParams` (of
        `ConvND`): `model/dense/kernel` is in `["model"]["dense"]`. Arrays are copies.

    Raises:
        TypeError: `weights` is not a mapping.
        ValueError: As in `from_torch`.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> weights = fc.interop.to_keras({"model": {"dense": layer}})
        >>> sorted(weights)
        ['model/dense/bias', 'model/dense/kernel']
        >>> fc.interop.from_keras(weights)["model"]["dense"].weight.shape
        (5, 10)
    """
    check_mapping(weights, "paths to arrays")
    return read_layers(nest({tuple(path.split("/")): weights[path] for path in weights}), _LAYOUT)


@public
def to_keras(params: Any) -> dict[str, np.ndarray]:
    """Converts parameters to those of a Keras model.

    Args:
        params: As in `to_torch`.

    Returns:
        A dict of NumPy arrays by path, for `variable.assign(arrays[variable.path])` with every
        variable of the model.

    Raises:
        TypeError: As in `to_torch`.
        ValueError: As in `to_torch`.

    Example: see `from_keras`.
    """
    return {"/".join(map(str, path)): a for path, a in write_layers(params, _LAYOUT).items()}
