"""Large heads: the cross-entropy without logits, and the layer in int8 and at low rank.

`python benchmarks/heads.py` (the `peers` and `examples` extras). The cross-entropy is its mean over
2,048 positions and its gradients with respect to weight, bias and input; in PyTorch by
`cross_entropy` on the logits, by `linear_cross_entropy`, and by that with its chunked option. The
layers are one forward call; float32 is the plain layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import timing
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]

POSITIONS, FEATURES, CLASSES = 2048, 512, 32_768


def plain_loss(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = fc.apply_linear(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def cross_entropy() -> Candidates:
    params = fc.init_linear(jax.random.key(0), FEATURES, CLASSES)
    x = jax.random.normal(jax.random.key(1), (POSITIONS, FEATURES))
    labels = jax.random.randint(jax.random.key(2), (POSITIONS,), 0, CLASSES)
    losses = {
        "fclayers": partial(fc.linear_cross_entropy, reduction="mean"),
        "plain jax": plain_loss,
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, loss in losses.items():
        step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x, labels).compile()
        print(f"{name}: {step.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB of temporaries")
        calls[name] = partial(_ready, step, params, x, labels)

    weight, bias, inputs = (
        torch.tensor(np.asarray(array), requires_grad=True)
        for array in (params.weight.T, params.bias, x)
    )
    targets = torch.tensor(np.asarray(labels), dtype=torch.int64)

    def backward(loss: Callable[[], torch.Tensor]) -> None:
        for tensor in (weight, bias, inputs):
            tensor.grad = None
        loss().backward()

    calls["torch"] = partial(
        backward, lambda: F.cross_entropy(F.linear(inputs, weight, bias), targets)
    )
    calls["torch linear"] = partial(
        backward, lambda: F.linear_cross_entropy(inputs, weight, targets, linear_bias=bias)
    )
    options = LinearCrossEntropyOptions()
    calls["torch chunked"] = partial(
        backward,
        lambda: F.linear_cross_entropy(inputs, weight, targets, linear_bias=bias, options=options),
    )
    return calls


def int8(batch: int, in_features: int, out_features: int) -> Candidates:
    layer = fc.init_linear(jax.random.key(0), in_features, out_features)
    x = jax.random.normal(jax.random.key(1), (batch, in_features))
    quantized, in_blocks = fc.quantize(layer), fc.quantize(layer, block_size=64)

    @jax.jit
    def plain(params: fc.LinearParams, x: jax.Array) -> jax.Array:
        return (x @ params.weight.values.astype(x.dtype)) * params.weight.scale[0] + params.bias

    module = torch.nn.Linear(in_features, out_features)
    module.load_state_dict({k: torch.from_numpy(a) for k, a in fc.interop.to_torch(layer).items()})
    inputs = torch.tensor(np.asarray(x))
    return {
        "fclayers": partial(_ready, fc.apply_linear, quantized, x),
        "in blocks": partial(_ready, fc.apply_linear, in_blocks, x),
        "float32": partial(_ready, fc.apply_linear, layer, x),
        "plain jax": partial(_ready, plain, quantized, x),
        "torch": torch.no_grad()(partial(module, inputs)),
    }


def low_rank(batch: int, rank: int) -> Candidates:
    x = jax.random.normal(jax.random.key(1), (batch, 4096))
    layer = fc.init_linear(jax.random.key(0), 4096, 4096)
    factors = fc.LinearParams(fc.LowRank(layer.weight[:, :rank], layer.weight[:rank]), layer.bias)
    return {
        "fclayers": partial(_ready, fc.apply_linear, factors, x),
        "float32": partial(_ready, fc.apply_linear, layer, x),
    }


def _ready(function: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(function(*args))


CASES = {
    f"cross-entropy {POSITIONS} × {FEATURES} → {CLASSES}": cross_entropy,
    **{
        f"int8 ({batch}, {inputs}) → 4096": partial(int8, batch, inputs, 4096)
        for inputs in (4096, 25088)
        for batch in (1, 8)
    },
    **{
        f"1/{2048 // rank} of the parameters ({batch}, 4096) → 4096": partial(low_rank, batch, rank)
        for rank in (512, 128)
        for batch in (1, 8, 512)
    },
}

if __name__ == "__main__":
    timing.run(CASES, default_output="outputs/benchmarks/heads.json")
