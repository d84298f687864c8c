"""The library on an accelerator, beside plain JAX.

`python benchmarks/accelerator.py` on a machine with a GPU or TPU. Every program is compiled once
and timed in interleaved rounds; its temporaries are those of the compiler's memory analysis. With
`--small` it runs tiny cases on any machine.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import timing
from jax import lax
from tqdm import tqdm

import fclayers as fc


class Candidate(NamedTuple):
    """A call to time, and its program's temporaries in bytes if it is one program."""

    call: Callable[[], Any]
    temporaries: int | None = None


Candidates = dict[str, Candidate]


def compiled(function: Callable[..., Any], *args: Any) -> Candidate:
    program = jax.jit(function).lower(*args).compile()
    return Candidate(partial(program, *args), program.memory_analysis().temp_size_in_bytes)


def cross_entropy(rows: int, features: int, classes: int, dtype: Any) -> Candidates:
    """Value and gradients of the loss of a head."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = fc.init_linear(keys[0], features, classes, dtype=dtype)
    x = jax.random.normal(keys[1], (rows, features), dtype)
    labels = jax.random.randint(keys[2], (rows,), 0, classes)

    def plain(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = fc.apply_linear(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def log_prob(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        log_prob, entropy = fc.linear_log_prob(params, x, labels)
        return -(log_prob + 0.01 * entropy).mean()

    def plain_log_prob(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(fc.apply_linear(params, x).astype(jnp.float32))
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return -(jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0] + 0.01 * entropy).mean()

    losses = {
        "fclayers": partial(fc.linear_cross_entropy, reduction="mean"),
        "plain JAX": plain,
        "log-probability and entropy": log_prob,
        "the same, plain JAX": plain_log_prob,
    }
    return {
        name: compiled(jax.value_and_grad(loss, (0, 1)), params, x, labels)
        for name, loss in losses.items()
    }


def windows(
    network: Callable[..., jax.Array], params: Any, window: int, image: jax.Array
) -> Candidates:
    """All windows of an image, by `slide` and in batches."""
    height, width = (size - window + 1 for size in image.shape[:2])
    corners = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)

    def in_batches(params: Any, image: jax.Array) -> jax.Array:
        def one(corner: jax.Array) -> jax.Array:
            start = (corner[0], corner[1], 0)
            cut = lax.dynamic_slice(image, start, (window, window, image.shape[2]))
            return network(params, cut)

        return lax.map(one, corners.reshape(-1, 2), batch_size=1024)

    sliding = fc.slide(network, (window, window))
    return {
        "fclayers": compiled(sliding, params, image),
        "windows": compiled(in_batches, params, image),
    }


def four_stages(size: int, *, padding: str) -> Candidates:
    """Four convolutions of 48 maps, each with a pool, on windows of 95×95."""
    kernels = ((4, 1), (5, 48), (4, 48), (4, 48))
    keys = jax.random.split(jax.random.key(0), 5)
    convs = [
        fc.init_conv(key, (k, k), inputs, 48)
        for key, (k, inputs) in zip(keys, kernels, strict=False)
    ]

    def features(convs: list[fc.ConvParams], x: jax.Array) -> jax.Array:
        for conv in convs:
            x = fc.max_pool(jax.nn.relu(fc.apply_conv(conv, x, padding=padding)), (2, 2))
        return x.reshape(-1)

    count = jax.eval_shape(features, convs, jax.ShapeDtypeStruct((95, 95, 1), jnp.float32)).size
    head = fc.init_mlp(keys[4], [count, 200, 2])

    def network(params: Any, x: jax.Array) -> jax.Array:
        return fc.apply_mlp(params[1], features(params[0], x))

    image = jax.random.normal(jax.random.key(1), (size, size, 1))
    return windows(network, (convs, head), 95, image)


def layer(rows: int, size: int) -> Candidates:
    """One layer, int8 beside arrays."""
    params = fc.init_linear(jax.random.key(0), size, size)
    x = jax.random.normal(jax.random.key(1), (rows, size))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    return {
        "int8": compiled(fc.apply_linear, fc.quantize(params), x),
        "float32": compiled(fc.apply_linear, params, x),
        "bfloat16": compiled(fc.apply_linear, *half),
    }


def training(sizes: tuple[int, ...], batch: int, steps: int) -> Candidates:
    """Steps of Adam: one call of an epoch, and as many calls of a jitted step."""
    params, optimizer = fc.init_mlp(jax.random.key(0), list(sizes)), optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(1), 2)
    data = {
        "x": jax.random.normal(keys[0], (batch * steps, sizes[0])),
        "y": jax.random.randint(keys[1], (batch * steps,), 0, sizes[-1]),
    }

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        logits = fc.apply_mlp(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    epoch = fc.train.make_epoch(loss_fn, optimizer, batch_size=batch)
    state = fc.train.init_state(params, optimizer, jax.random.key(2))

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, batch, jax.random.key(0))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    batches = [
        jax.tree.map(lambda a, i=i: a[i * batch : (i + 1) * batch], data) for i in range(steps)
    ]

    def plain() -> Any:
        now = params, optimizer.init(params)
        for one in batches:
            now = step(*now, one)
        return now

    return {
        "fclayers": Candidate(lambda: epoch(jax.tree.map(jnp.copy, state), data)),
        "plain JAX": Candidate(plain),
    }


def per_example(sizes: tuple[int, ...], examples: int) -> Candidates:
    """Norms of the gradients of a batch's examples, and their clipped sum."""
    params = fc.init_mlp(jax.random.key(0), list(sizes))
    keys = jax.random.split(jax.random.key(1), 2)
    batch = (
        jax.random.normal(keys[0], (examples, sizes[0])),
        jax.random.randint(keys[1], (examples,), 0, sizes[-1]),
    )

    def loss(params: Any, example: Any) -> jax.Array:
        x, label = example
        logits = fc.apply_mlp(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def of_all(params: Any, batch: Any) -> Any:
        return jax.vmap(jax.grad(loss), (None, 0))(params, batch)

    def norms(params: Any, batch: Any) -> jax.Array:
        squares = [
            (g**2).reshape(examples, -1).sum(1) for g in jax.tree.leaves(of_all(params, batch))
        ]
        return jnp.sqrt(sum(squares))

    def clipped(params: Any, batch: Any) -> Any:
        grads = of_all(params, batch)
        squares = [(g**2).reshape(examples, -1).sum(1) for g in jax.tree.leaves(grads)]
        scale = jnp.minimum(1, 1 / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), grads)

    def of_batch(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batch).sum())(params)

    functions = {
        "norms": fc.per_example_norms(loss),
        "norms, vmap(grad)": norms,
        "clipped": fc.clipped_grad(loss, 1.0),
        "clipped, vmap(grad)": clipped,
        "batch gradient": of_batch,
    }
    return {name: compiled(function, params, batch) for name, function in functions.items()}


CASES: dict[str, Callable[[], Candidates]] = {
    "loss, 8192 × 2048 → 131072, float32": lambda: cross_entropy(8192, 2048, 131_072, jnp.float32),
    "loss, 8192 × 4096 → 131072, bfloat16": lambda: cross_entropy(
        8192, 4096, 131_072, jnp.bfloat16
    ),
    "95×95 windows on 256×256": lambda: four_stages(256, padding="VALID"),
    "95×95 windows on 256×256, padded": lambda: four_stages(256, padding="SAME"),
    "layer, 1 × 8192 → 8192": lambda: layer(1, 8192),
    "layer, 512 × 8192 → 8192": lambda: layer(512, 8192),
    "Adam, 64-128-128-10, batch 64, 32 steps": lambda: training((64, 128, 128, 10), 64, 32),
    "Adam, 784-2048-2048-10, batch 1024, 32 steps": lambda: training(
        (784, 2048, 2048, 10), 1024, 32
    ),
    "gradients of 256 examples, 784-1024-1024-10": lambda: per_example((784, 1024, 1024, 10), 256),
}
SMALL: dict[str, Callable[[], Candidates]] = {
    "loss": lambda: cross_entropy(64, 32, 1000, jnp.float32),
    "windows": lambda: four_stages(100, padding="SAME"),
    "layer": lambda: layer(4, 64),
    "Adam": lambda: training((8, 16, 3), 8, 4),
    "gradients": lambda: per_example((8, 16, 3), 8),
}


def ready(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny cases")
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/accelerator.json"))
    args = parser.parse_args()
    print(jax.devices()[0].device_kind)
    cases = SMALL if args.small else CASES
    results = {}
    for case in tqdm([name for name in cases if args.only in name], unit="case"):
        candidates = cases[case]()
        calls = {name: partial(ready, one.call) for name, one in candidates.items()}
        results[case] = timing.time_side_by_side(calls, rounds=args.rounds)
        tqdm.write(case)
        for name, seconds in results[case].items():
            size = candidates[name].temporaries
            memory = "" if size is None else f"{size / 1e6:9.1f} MB of temporaries"
            tqdm.write(f"  {name:30} {seconds * 1e3:10.3f} ms {memory}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
