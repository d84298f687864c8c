"""The layers that are carried between frameworks: their sizes, inputs and results here."""

from typing import NamedTuple

import numpy as np

import fclayers as fc

FRAMEWORKS = ("torch", "linen", "nnx", "haiku", "equinox", "keras")


class LayerCase(NamedTuple):
    """A fully connected layer (no kernel) or a convolution, on an input of five channels-last."""

    name: str
    kernel: tuple[int, ...] = ()
    in_features: int = 4
    out_features: int = 6
    groups: int = 1
    bias: bool = True

    @property
    def x(self) -> np.ndarray:
        """Input of shape `(2, *spatial, in_features)`."""
        shape = (2, *(5 for _ in self.kernel), self.in_features)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


CASES = (
    LayerCase("linear"),
    LayerCase("linear_without_bias", bias=False),
    LayerCase("conv1d", (3,), groups=2),
    LayerCase("conv2d", (3, 2)),
    LayerCase("conv2d_without_bias", (2, 2), bias=False),
    LayerCase("depthwise", (3, 3), groups=4, out_features=8),
    LayerCase("conv3d", (2, 1, 3)),
)


def fclayers_function(framework: str, direction: str):
    """`from_flax` for `("linen", "from")`, and so on."""
    framework = {"linen": "flax", "nnx": "flax"}.get(framework, framework)
    return getattr(fc.interop, f"{direction}_{framework}")


def fclayers_result(case: LayerCase, params) -> np.ndarray:
    if case.kernel:
        return np.asarray(fc.apply_conv(params, case.x, groups=case.groups))
    return np.asarray(fc.apply_linear(params, case.x))
