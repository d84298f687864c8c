"""The fully connected layer, complete: pure JAX functions over parameter pytrees."""

from fclayers.conv import ConvParams, apply_conv, avg_pool, init_conv, max_pool
from fclayers.convert import conv_to_linear, linear_to_conv, mlp_to_conv
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
    "ConvParams",
    "LinearParams",
    "apply_bilinear",
    "apply_conv",
    "apply_linear",
    "apply_mlp",
    "avg_pool",
    "conv_to_linear",
    "init_bilinear",
    "init_conv",
    "init_linear",
    "init_mlp",
    "linear_to_conv",
    "max_pool",
    "mlp_to_conv",
    "summarize",
]
