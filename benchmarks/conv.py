"""Convolutions and pools against plain `lax` and PyTorch, in float32.

`python benchmarks/conv.py` (the `peers` and `examples` extras). PyTorch runs in its faster layout,
channels last. Backward is the loss ½ mean(y²) with its gradients with respect to weight and input.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]

# batch, map, kernel, in channels, out channels
CONVS = [
    (1, 7, 7, 512, 4096),
    (1, 14, 7, 512, 4096),
    (1, 28, 7, 512, 4096),
    (1, 240, 1, 128, 113),
    (1, 56, 1, 256, 512),
    (8, 28, 1, 256, 512),
    (32, 14, 1, 512, 512),
    (1, 14, 3, 512, 512),
    (8, 7, 3, 512, 512),
    (1, 56, 3, 64, 64),
    (64, 8, 3, 1, 16),
]
# batch, map, channels, window, stride
POOLS = [(1, 224, 64, 2, 2), (8, 56, 64, 2, 2), (1, 112, 64, 3, 2), (1, 128, 64, 2, 1)]


def plain_conv(params: Any, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
        x, params.weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + params.bias


def conv(
    batch: int, size: int, kernel: int, inputs: int, outputs: int, backward: bool
) -> Candidates:
    params = fc.init_conv(jax.random.key(0), (kernel, kernel), inputs, outputs)
    x = np.random.default_rng(0).standard_normal((batch, size, size, inputs), np.float32)
    weight = torch.tensor(np.transpose(params.weight, (3, 2, 0, 1)))
    weight = weight.contiguous(memory_format=torch.channels_last)
    torch_conv = partial(F.conv2d, weight=weight, bias=torch.tensor(np.asarray(params.bias)))
    return _candidates(
        {"fclayers": partial(fc.apply_conv, params), "lax": partial(plain_conv, params)},
        {"fclayers": fc.apply_conv, "lax": plain_conv},
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
            f"{'both' if backward else 'forward'} conv {shape}": partial(
                conv, *shape, backward=backward
            )
            for backward in (False, True)
            for shape in CONVS
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
