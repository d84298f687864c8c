"""Weights from and to PyTorch, and from torchvision."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fclayers._util.checks import check_features
from fclayers._util.errors import BadValue, public
from fclayers._util.trees import Path, is_layer
from fclayers.bilinear import BilinearParams
from fclayers.interop._layers import (
    AnyArray,
    Layer,
    Layout,
    check_entries,
    check_mapping,
    nest,
    read_layers,
    read_out_in,
    write_layers,
    write_out_in,
)
from fclayers.linear import LinearParams
from fclayers.models.vgg import Vgg16Params, init_vgg16
from fclayers.weights.form import dense, layer_shapes


@public
def from_torch(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    flattened: tuple[int, ...] | None = None,
    bilinear: bool = False,
) -> Any:
    """Converts a PyTorch state dict to parameters.

    Args:
        state_dict: `model.state_dict()`, or any mapping of PyTorch's names to arrays.
        prefix: Name of the layer or part of the model to convert. Default: all of it.
        flattened: `(C, H, W)`, or `(C, L)` or `(C, D, H, W)`: the shape, without batch, that
            PyTorch's `flatten` takes before a fully connected layer. The inputs of that layer,
            the only one with `C·H·W` of them, are reordered to a flattened `(H, W, C)`.
        bilinear: Whether weights of three axes belong to `nn.Bilinear`, not to `nn.Conv1d`.

    Returns:
        `LinearParams`, `ConvParams` or `BilinearParams` if `prefix` names a layer, else a dict of
        them, nested as the names are: `features.0.weight` is in `["features"]["0"]`. Arrays are
        copies, with JAX's dtypes (64 bits become 32 unless `jax_enable_x64` is set).

    Raises:
        TypeError: `state_dict` is not a mapping.
        ValueError: No entry has the prefix, or entries are not those of fully connected layers and
            convolutions; the message names all of them. Convert a model with other layers, such
            as norms, part by part.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 5, 10)
        >>> state_dict = fc.interop.to_torch(layer, "fc")
        >>> {name: array.shape for name, array in state_dict.items()}
        {'fc.weight': (10, 5), 'fc.bias': (10,)}
        >>> fc.interop.from_torch(state_dict, "fc").weight.shape
        (5, 10)
        >>> sorted(fc.interop.from_torch(state_dict))
        ['fc']
    """
    check_mapping(state_dict, "names to arrays such as model.state_dict()")
    start = f"{prefix}." if prefix else ""
    below: dict[Path, Any] = {
        tuple(entry.removeprefix(start).split(".")): array
        for entry, array in state_dict.items()
        if entry.startswith(start)
    }
    if not below:
        raise BadValue(f"no entry starts with {start!r}; the entries are {', '.join(state_dict)}")
    layout = _LAYOUT._replace(read=_read_bilinear) if bilinear else _LAYOUT
    layers = read_layers(nest(below), layout)
    return layers if flattened is None else _move_channels(layers, flattened, last=True)


@public
def to_torch(
    params: Any, prefix: str = "", *, flattened: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """Converts parameters to a PyTorch state dict.

    Args:
        params: A layer, or any nesting of dicts, tuples and lists of layers. Weights in other forms
            are materialized.
        prefix: Prefix of all names.
        flattened: As in `from_torch`: the inputs of the layer with `C·H·W` of them, flattened or
            on three axes, are reordered from `(H, W, C)` to PyTorch's `(C, H, W)`.

    Returns:
        A dict of NumPy arrays with the names of a state dict, for
        `model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})`.

    Raises:
        TypeError: A leaf of `params` is not in a layer.
        ValueError: No layer, or more than one, has the flattened inputs, or a fully connected layer
            has several input or output axes.

    Example: see `from_torch`.
    """
    if flattened is not None:
        params = _move_channels(params, flattened, last=False)
    arrays = write_layers(params, _LAYOUT)
    start = (prefix,) if prefix else ()
    return {".".join(map(str, (*start, *path))): array for path, array in arrays.items()}


@public
def vgg16_from_torch(state_dict: Mapping[str, Any]) -> Vgg16Params:
    """Converts a state dict of torchvision's VGG-16 to parameters.

    Args:
        state_dict: `torchvision.models.vgg16().state_dict()`, or any mapping of its names,
            `features.0.weight` to `classifier.6.bias`, to arrays. The number of classes is free.

    Returns:
        The parameters for `apply_vgg16` and `vgg16_score_map`, the first fully connected layer's
        inputs reordered from PyTorch's `(C, H, W)` to `(H, W, C)`.

    Raises:
        TypeError: `state_dict` is not a mapping.
        ValueError: An entry is missing, extra or misshapen; the message names all of them.

    Example: `fc.interop.vgg16_from_torch(fc.interop.load_safetensors("vgg16.safetensors"))`.

    Source: the names and shapes documented by
    `torchvision <https://docs.pytorch.org/vision/stable/models/vgg.html>`_.
    """
    check_mapping(state_dict)
    weight = state_dict.get("classifier.6.weight")
    num_classes = 1000 if weight is None else len(weight)
    template = jax.eval_shape(partial(init_vgg16, num_classes=num_classes), jax.random.key(0))
    layers, structure = jax.tree.flatten(template, is_leaf=is_layer)
    names = _names(template)
    expected: dict[str, Any] = {}
    for name, layer in zip(names, layers, strict=True):
        weight, bias = jax.eval_shape(write_out_in, layer)
        expected |= {f"{name}.weight": weight, f"{name}.bias": bias}
    check_entries(state_dict, expected, dtypes=False)
    model = from_torch(state_dict, flattened=(512, 7, 7))
    params: Vgg16Params = jax.tree.unflatten(
        structure, [model[part][index] for part, index in (name.split(".") for name in names)]
    )
    return params


def _move_channels(params: Any, flattened: tuple[int, ...], *, last: bool) -> Any:
    """Reorders the inputs of the one layer behind a flatten: channels last, or first."""
    shape = check_features("flattened", flattened)
    channels, *spatial = shape

    def follows(layer: Any) -> bool:
        in_shape = layer_shapes(layer)[0] if isinstance(layer, LinearParams) else ()
        return prod(in_shape) == prod(shape) and len(in_shape) in (1, len(shape))

    def reorder(layer: Any) -> Any:
        if not follows(layer):
            return layer
        weight = dense(layer.weight, len(layer_shapes(layer)[0]))
        if last:
            weight = jnp.moveaxis(weight.reshape(*shape, -1), 0, -2)
        else:
            weight = jnp.moveaxis(weight.reshape(*spatial, channels, -1), -2, 0)
        return layer._replace(weight=weight.reshape(prod(shape), -1))

    matches = sum(map(follows, jax.tree.leaves(params, is_leaf=is_layer)))
    if matches != 1:
        raise BadValue(
            f"flattened={shape} is for one fully connected layer of {prod(shape)} "
            f"inputs, but {matches} have as many; choose the layer by its name"
        )
    return jax.tree.map(reorder, params, is_leaf=is_layer)


def _read_bilinear(weight: AnyArray, bias: AnyArray | None) -> Layer:
    if weight.ndim == 3:
        return BilinearParams(weight.transpose(1, 2, 0), bias)
    return read_out_in(weight, bias)


def _write(layer: Layer) -> tuple[AnyArray, AnyArray | None]:
    if isinstance(layer, BilinearParams):
        return layer.weight.transpose(2, 0, 1), layer.bias
    if isinstance(layer, LinearParams) and layer.weight.ndim != 2:
        raise BadValue(
            f"PyTorch has no layer with a weight of shape {layer.weight.shape}; pass "
            "flattened=(C, H, W) if it follows a flatten"
        )
    return write_out_in(layer)


_LAYOUT = Layout("weight", "bias", read_out_in, _write)


def _names(params: Vgg16Params) -> list[str]:
    """Torchvision's names of the layers, which count activations, pools and dropout too."""
    names, index = [], 0
    for block in params.features:
        names += [f"features.{index + 2 * i}" for i in range(len(block))]
        index += 2 * len(block) + 1
    return names + [f"classifier.{3 * i}" for i in range(len(params.classifier))]
