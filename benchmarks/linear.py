"""The fully connected layer against PyTorch, NumPy, Equinox, Flax NNX and Haiku, in float32.

`python benchmarks/linear.py` (the `peers` and `examples` extras). Forward is one jitted call (one
`no_grad` call in PyTorch). Forward+backward is the loss ½ mean(y²) and its gradients with respect
to weight, bias and input, each framework in its documented way.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
from flax import nnx

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]

BATCHES = (1, 8, 32, 128, 512)
FEATURES = ((512, 512), (784, 512), (1024, 1024), (4096, 4096))
SHAPES = [(batch, *features) for features in FEATURES for batch in BATCHES] + [(1, 25088, 4096)]


def make_layers(in_features: int, out_features: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Every JAX framework's layer as `apply(params, x)`."""
    key = jax.random.key(0)
    equinox_layer = eqx.nn.Linear(in_features, out_features, key=key)
    graph, state = nnx.split(nnx.Linear(in_features, out_features, rngs=nnx.Rngs(0)))
    haiku_layer = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(out_features)(x)))
    haiku_params = haiku_layer.init(key, jnp.ones((1, in_features)))
    return {
        "fclayers": (fc.apply_linear, fc.init_linear(key, in_features, out_features)),
        "equinox": (lambda layer, x: jax.vmap(layer)(x), equinox_layer),
        "flax nnx": (lambda state, x: nnx.merge(graph, state)(x), state),
        "haiku": (haiku_layer.apply, haiku_params),
    }


def forward(batch: int, in_features: int, out_features: int) -> Candidates:
    x = np.random.default_rng(0).standard_normal((batch, in_features), np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (apply, params) in make_layers(in_features, out_features).items():
        jitted = apply if name == "fclayers" else jax.jit(apply)
        calls[name] = partial(_ready, jitted, params, jnp.asarray(x))
        if name == "fclayers":
            calls["torch"] = _torch_forward(x, out_features)
            calls["numpy"] = partial(_numpy_forward, x, *map(np.asarray, params))
    return calls


def forward_backward(batch: int, in_features: int, out_features: int) -> Candidates:
    x = np.random.default_rng(0).standard_normal((batch, in_features), np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (apply, params) in make_layers(in_features, out_features).items():

        def loss(params: Any, x: jax.Array, apply: Any = apply) -> jax.Array:
            return 0.5 * jnp.mean(apply(params, x) ** 2)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        calls[name] = partial(_ready, step, params, jnp.asarray(x))
        if name == "fclayers":
            calls["torch"] = _torch_forward_backward(x, out_features)
    return calls


def _ready(call: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(call(*args))


def _numpy_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ weight + bias


def _torch_forward(x: np.ndarray, out_features: int) -> Callable[[], Any]:
    layer, inputs = torch.nn.Linear(x.shape[-1], out_features), torch.tensor(x)

    def call() -> Any:
        with torch.no_grad():
            return layer(inputs)

    return call


def _torch_forward_backward(x: np.ndarray, out_features: int) -> Callable[[], Any]:
    layer = torch.nn.Linear(x.shape[-1], out_features)
    inputs = torch.tensor(x, requires_grad=True)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        inputs.grad = None
        (0.5 * layer(inputs).square().mean()).backward()

    return call


def print_import_time() -> None:
    """Prints what `import fclayers` costs after `import jax`, in processes of their own."""
    code = (
        "import jax, time; t = time.perf_counter(); import fclayers; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(7)
    ]
    print(f"import fclayers, after import jax: {median(times) * 1e3:.0f} ms (median of 7)")


if __name__ == "__main__":
    print_import_time()
    timing.run(
        {
            f"{name} ({', '.join(map(str, shape))})": partial(make, *shape)
            for name, make in (("forward", forward), ("forward+backward", forward_backward))
            for shape in SHAPES
        },
        default_output="outputs/benchmarks/linear.json",
    )
