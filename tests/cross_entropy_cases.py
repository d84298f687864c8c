"""What is compared with PyTorch's cross-entropy, live and stored: inputs here, results there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fclayers as fc


class LossCase(NamedTuple):
    """A head of 11 classes on 7 positions, two of which are ignored in the second case."""

    name: str
    smoothing: float = 0.0
    ignore: bool = False
    reduction: str = "none"
    scale: float = 1.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Weight (classes, features), bias, x and labels; an ignored label is -100."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 11, 7)
        if self.ignore:
            labels[[2, 5]] = -100
        return {
            "weight": self.scale * rng.standard_normal((11, 5)),
            "bias": rng.standard_normal(11),
            "x": rng.standard_normal((7, 5)),
            "labels": labels,
        }


CASES = (
    LossCase("plain"),
    LossCase("smoothed", smoothing=0.1),
    LossCase("ignored", smoothing=0.2, ignore=True, reduction="mean"),
    LossCase("sum", ignore=True, reduction="sum"),
    LossCase("large", scale=5e3, reduction="mean"),
)


def fclayers_losses(case: LossCase) -> dict[str, np.ndarray]:
    """The loss and the gradients of its sum, in float64, with the weight as PyTorch stores it."""
    arrays = case.arrays()
    labels = arrays.pop("labels")

    def loss(weight, bias, x):
        return fc.linear_cross_entropy(
            fc.LinearParams(weight.T, bias),
            x,
            labels,
            where=labels != -100,
            label_smoothing=case.smoothing,
            reduction=case.reduction,
            chunk_size=4,
        )

    with jax.enable_x64(True):
        value, pull = jax.vjp(loss, *map(jnp.asarray, arrays.values()))
        gradients = pull(jnp.ones_like(value))
    names = ("loss", *(f"{name}'s gradient" for name in arrays))
    return dict(zip(names, map(np.asarray, (value, *gradients)), strict=True))
