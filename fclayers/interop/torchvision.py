"""Weights from torchvision's models."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from fclayers._checks import describe
from fclayers.interop._layers import check_entries, is_layer, write_out_in
from fclayers.interop.torch import from_torch
from fclayers.models.vgg import Vgg16Params, init_vgg16


def vgg16_from_torch(state_dict: Mapping[str, Any]) -> Vgg16Params:
    """Takes over a VGG-16 with torchvision's names.

    Args:
        state_dict: `torchvision.models.vgg16().state_dict()`, or any mapping of its names,
            `features.0.weight` to `classifier.6.bias`, to arrays. The number of classes is free.

    Returns:
        The parameters for `apply_vgg16` and `vgg16_score_map`, the first fully connected layer's
        inputs reordered from PyTorch's `(C, H, W)` to `(H, W, C)`.

    Raises:
        TypeError: `state_dict` is not a mapping.
        ValueError: An entry is missing, extra or misshapen; the message names all of them.

    Example: `fc.vgg16_from_torch(fc.load_safetensors("vgg16.safetensors"))`.

    Source: the names and shapes documented by
    `torchvision <https://docs.pytorch.org/vision/stable/models/vgg.html>`_.
    """
    name = "vgg16_from_torch"
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{name}: expected a mapping of names to arrays, got {describe(state_dict)}"
        )
    weight = state_dict.get("classifier.6.weight")
    num_classes = 1000 if weight is None else len(weight)
    template = jax.eval_shape(partial(init_vgg16, num_classes=num_classes), jax.random.key(0))
    templates, structure = jax.tree.flatten(template, is_leaf=is_layer)
    names = _names(template)
    expected: dict[str, Any] = {}
    for layer, shapes in zip(names, templates, strict=True):
        weight, bias = jax.eval_shape(write_out_in, shapes)
        expected |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    check_entries(name, state_dict, expected, dtypes=False)
    first_of_head = "classifier.0"
    layers = [
        from_torch(state_dict, layer, flattened=(512, 7, 7) if layer == first_of_head else None)
        for layer in names
    ]
    params: Vgg16Params = jax.tree.unflatten(structure, layers)
    return params


def _names(params: Vgg16Params) -> list[str]:
    """Torchvision's names of the layers, which count activations, pools and dropout too."""
    names, index = [], 0
    for block in params.features:
        names += [f"features.{index + 2 * i}" for i in range(len(block))]
        index += 2 * len(block) + 1
    return names + [f"classifier.{3 * i}" for i in range(len(params.classifier))]
