"""Convolutions and pools against plain `lax` and PyTorch, in float32.

`python benchmarks/conv.py` (the `peers` and `examples` extras). PyTorch runs in its faster layout,
channels last. Backward is the loss ½ mean(y²) with its gradients with respect to weight and input.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]


class Conv(NamedTuple):
    """A convolution of square maps without padding."""

    batch: int
    size: int
    kernel: int
    inputs: int
    outputs: int
    dilation: int = 1
    groups: int = 1

    def __str__(self) -> str:
        """The first five sizes, and the others where they are not 1."""
        extras = {"dilation": self.dilation, "groups": self.groups}
        named = "".join(f", {name} {value}" for name, value in extras.items() if value > 1)
        return f"{tuple(self[:5])}{named}"


CONVS = [
    Conv(1, 7, 7, 512, 4096),
    Conv(1, 14, 7, 512, 4096),
    Conv(1, 28, 7, 512, 4096),
    Conv(1, 240, 1, 128, 113),
    Conv(1, 56, 1, 256, 512),
    Conv(8, 28, 1, 256, 512),
    Conv(32, 14, 1, 512, 512),
    Conv(1, 14, 3, 512, 512),
    Conv(8, 7, 3, 512, 512),
    Conv(1, 56, 3, 64, 64),
    Conv(64, 8, 3, 1, 16),
    Conv(1, 250, 5, 48, 48, dilation=2),
    Conv(1, 240, 4, 48, 48, dilation=4),
    Conv(1, 112, 3, 128, 128),
    Conv(1, 56, 3, 256, 256),
    Conv(1, 128, 3, 32, 32, dilation=2),
    Conv(1, 240, 3, 1, 8),
    Conv(1, 256, 4, 1, 48),
    Conv(1, 224, 3, 3, 64),
    Conv(1, 112, 3, 32, 32, groups=32),
    Conv(1, 56, 3, 128, 128, groups=128),
    Conv(1, 14, 3, 512, 512, groups=512),
    Conv(1, 56, 3, 128, 128, groups=32),
    Conv(1, 56, 3, 128, 128, groups=4),
]
# batch, map, channels, window, stride
POOLS = [(1, 224, 64, 2, 2), (8, 56, 64, 2, 2), (1, 112, 64, 3, 2), (1, 128, 64, 2, 1)]


def plain_conv(params: Any, x: jax.Array, *, dilation: int, groups: int) -> jax.Array:
    y = lax.conv_general_dilated(
        x,
        params.weight,
        (1, 1),
        "VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + params.bias


def conv(case: Conv, *, backward: bool) -> Candidates:
    kwargs = {"dilation": case.dilation, "groups": case.groups}
    kernel = (case.kernel, case.kernel)
    params = fc.init_conv(jax.random.key(0), kernel, case.inputs, case.outputs, groups=case.groups)
    shape = (case.batch, case.size, case.size, case.inputs)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    weight = torch.tensor(np.transpose(params.weight, (3, 2, 0, 1)))
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.tensor(np.asarray(params.bias))
    torch_conv = partial(F.conv2d, weight=weight, bias=bias, **kwargs)
    ours, plain = partial(fc.apply_conv, **kwargs), partial(plain_conv, **kwargs)
    return _candidates(
        {"fclayers": partial(ours, params), "lax": partial(plain, params)},
        {"fclayers": ours, "lax": plain},
        torch_conv,
        params,
        x,
        [weight] if backward else None,
    )


def pool(
    batch: int, size: int, channels: int, window: int, stride: int, kind: str, backward: bool
) -> Candidates:
    x = np.random.default_rng(0).standard_normal((batch, size, size, channels), np.float32)
    ours = partial(getattr(fc, f"{kind}_pool"), window_shape=(window, window), stride=stride)
    initial, monoid = (-jnp.inf, lax.max) if kind == "max" else (0.0, lax.add)

    def plain(x: jax.Array) -> jax.Array:
        dims, strides = (1, window, window, 1), (1, stride, stride, 1)
        y = lax.reduce_window(x, initial, monoid, dims, strides, "VALID")
        return y if kind == "max" else y / window**2

    torch_pool = partial(getattr(F, f"{kind}_pool2d"), kernel_size=window, stride=stride)
    functions = {"fclayers": ours, "lax": plain}
    with_params = {
        name: lambda _, x, function=function: function(x) for name, function in functions.items()
    }
    return _candidates(functions, with_params, torch_pool, (), x, [] if backward else None)


def _candidates(
    forward: Mapping[str, Any],
    with_params: Mapping[str, Any],
    torch_forward: Any,
    params: Any,
    x: np.ndarray,
    leaves: list[torch.Tensor] | None,
) -> Candidates:
    inputs = torch.tensor(x).permute(0, 3, 1, 2)
    if leaves is None:

        def torch_call() -> Any:
            with torch.no_grad():
                return torch_forward(inputs)

        calls = {name: partial(_ready, jax.jit(f), jnp.asarray(x)) for name, f in forward.items()}
        return calls | {"torch": torch_call}

    for leaf in (*leaves, inputs):
        leaf.requires_grad_()

    def torch_step() -> None:
        for leaf in (*leaves, inputs):
            leaf.grad = None
        (0.5 * torch_forward(inputs).square().mean()).backward()

    calls = {}
    for name, function in with_params.items():

        def loss(params: Any, x: jax.Array, function: Any = function) -> jax.Array:
            return 0.5 * jnp.mean(function(params, x) ** 2)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        calls[name] = partial(_ready, step, params, jnp.asarray(x))
    return calls | {"torch": torch_step}


def _ready(call: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(call(*args))


if __name__ == "__main__":
    timing.run(
        {
            f"{'both' if backward else 'forward'} conv {case}": partial(
                conv, case, backward=backward
            )
            for backward in (False, True)
            for case in CONVS
        }
        | {
            f"{'both' if backward else 'forward'} {kind} pool {shape}": partial(
                pool, *shape, kind=kind, backward=backward
            )
            for backward in (False, True)
            for kind in ("max", "avg")
            for shape in POOLS
        },
        default_output="outputs/benchmarks/conv.json",
    )
