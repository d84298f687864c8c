"""The fully connected layer, complete: pure JAX functions over parameter pytrees."""

from fclayers.inspect import summarize
from fclayers.linear import (
    LinearParams,
    apply_bilinear,
    apply_linear,
    init_bilinear,
    init_linear,
)
from fclayers.mlp import apply_mlp, init_mlp

__all__ = [
    "LinearParams",
    "apply_bilinear",
    "apply_linear",
    "apply_mlp",
    "init_bilinear",
    "init_linear",
    "init_mlp",
    "summarize",
]
