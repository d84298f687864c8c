"""Weights from and to other frameworks, and safetensors files."""

from fclayers.interop.equinox import from_equinox, to_equinox
from fclayers.interop.flax import from_flax, to_flax
from fclayers.interop.haiku import from_haiku, to_haiku
from fclayers.interop.keras import from_keras, to_keras
from fclayers.interop.safetensors import load_safetensors, save_safetensors
from fclayers.interop.torch import from_torch, to_torch, vgg16_from_torch

__all__ = [
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_torch",
    "load_safetensors",
    "save_safetensors",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_torch",
    "vgg16_from_torch",
]
