"""Steps of Adam against PyTorch, Flax NNX, Equinox and Haiku, each in its documented idiom.

`python benchmarks/training.py` (the `peers`, `train` and `examples` extras). A call is an epoch of
`STEPS` steps in float32, for fclayers one call of `make_epoch`, which shuffles as well; the others
take batches that are ready. `torch.compile` needs a C++ compiler. Then follow the share of the
practical matrix-multiply peak, and what checkpoints cost.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
import torch
from flax import nnx
from tqdm import tqdm

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]
Batches = list[tuple[Any, Any]]

STEPS = 32
NETWORKS = {(64, 128, 128, 10): 64, (784, 512, 512, 10): 128}  # sizes: batch size
OPTIMIZER = optax.adam(1e-3)
FLAT_OPTIMIZER = optax.flatten(OPTIMIZER)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def make_data(sizes: tuple[int, ...], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    samples = STEPS * batch_size
    return rng.standard_normal((samples, sizes[0]), np.float32), rng.integers(0, 10, samples)


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    x, y = batch
    return cross_entropy(fc.apply_mlp(params, x), y).mean()


def new_state(
    sizes: tuple[int, ...], optimizer: optax.GradientTransformation
) -> fc.train.TrainState:
    params = fc.init_mlp(jax.random.key(0), sizes)
    return fc.train.init_state(params, optimizer, jax.random.key(1))


def ours(
    sizes: tuple[int, ...], batch_size: int, optimizer: optax.GradientTransformation = OPTIMIZER
) -> Callable[[], Any]:
    data = jax.tree.map(jnp.asarray, make_data(sizes, batch_size))
    epoch = fc.train.make_epoch(loss_fn, optimizer, batch_size=batch_size)
    state = new_state(sizes, optimizer)

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(epoch(state, data))

    return call


def ours_by_steps(sizes: tuple[int, ...], batches: Batches) -> Callable[[], Any]:
    step = fc.train.make_step(loss_fn, OPTIMIZER)
    state = new_state(sizes, OPTIMIZER)

    def call() -> None:
        nonlocal state
        for batch in batches:
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return call


def flax(sizes: tuple[int, ...], batches: Batches) -> Callable[[], Any]:
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(sizes)]
    model = nnx.Sequential(layers[0], *[part for layer in layers[1:] for part in (nnx.relu, layer)])
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x), y).mean())(model)
        optimizer.update(model, grads)
        return loss

    def call() -> None:
        for x, y in batches:
            loss = step(model, optimizer, x, y)
        jax.block_until_ready((loss, nnx.state(model)))

    return call


def equinox(sizes: tuple[int, ...], batches: Batches) -> Callable[[], Any]:
    key = jax.random.key(0)
    model = eqx.nn.MLP(sizes[0], sizes[-1], sizes[1], len(sizes) - 2, key=key)
    opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_value_and_grad
    def loss_and_grads(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(model)(x), y).mean()

    @eqx.filter_jit
    def step(model: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = loss_and_grads(model, x, y)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    def call() -> None:
        nonlocal model, opt_state
        for x, y in batches:
            model, opt_state, loss = step(model, opt_state, x, y)
        jax.block_until_ready((eqx.filter(model, eqx.is_array), loss))

    return call


def haiku(sizes: tuple[int, ...], batches: Batches) -> Callable[[], Any]:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(sizes[1:])(x)))
    params = network.init(jax.random.key(0), batches[0][0])
    opt_state = OPTIMIZER.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(
            lambda params: cross_entropy(network.apply(params, x), y).mean()
        )(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    def call() -> None:
        nonlocal params, opt_state
        for x, y in batches:
            params, opt_state, loss = step(params, opt_state, x, y)
        jax.block_until_ready((params, loss))

    return call


def pytorch(sizes: tuple[int, ...], batches: Batches, compiled: bool) -> Callable[[], Any]:
    layers = [torch.nn.Linear(i, o) for i, o in pairwise(sizes)]
    parts = [part for layer in layers[1:] for part in (torch.nn.ReLU(), layer)]
    model = torch.nn.Sequential(layers[0], *parts)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    apply = torch.compile(model) if compiled else model
    tensors = [(torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y))) for x, y in batches]

    def call() -> None:
        for x, y in tensors:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(apply(x), y.long()).backward()
            optimizer.step()

    return call


def compare(sizes: tuple[int, ...], batch_size: int) -> Candidates:
    x, y = make_data(sizes, batch_size)
    cut = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    batches = [(jnp.asarray(x[rows]), jnp.asarray(y[rows])) for rows in cut]
    return {
        "fclayers": ours(sizes, batch_size),
        "optax.flatten": ours(sizes, batch_size, FLAT_OPTIMIZER),
        "make_step": ours_by_steps(sizes, batches),
        "flax nnx": flax(sizes, batches),
        "torch": pytorch(sizes, batches, compiled=False),
        "torch.compile": pytorch(sizes, batches, compiled=True),
        "equinox": equinox(sizes, batches),
        "haiku": haiku(sizes, batches),
    }


def print_share_of_peak() -> None:
    """Prints the rate of a step's products, against NumPy's and JAX's on a large one."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((512, 2048), np.float32)
    b = rng.standard_normal((2048, 2048), np.float32)
    on_device, product = (jnp.asarray(a), jnp.asarray(b)), jax.jit(jnp.matmul)
    for sizes, batch_size in NETWORKS.items():
        times = timing.time_side_by_side(
            {
                "epoch": ours(sizes, batch_size),
                "numpy": lambda: a @ b,
                "jax": lambda: product(*on_device).block_until_ready(),
            }
        )
        weights = [i * o for i, o in pairwise(sizes)]
        # The input has no gradient: the first layer has two products, the others have three.
        flops = STEPS * 2 * batch_size * (3 * sum(weights) - weights[0])
        rate = flops / times["epoch"]
        peak = 2 * a.shape[0] * b.size / min(times["numpy"], times["jax"])
        print(
            f"{'-'.join(map(str, sizes))}: {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the peak "
            f"of {peak / 1e9:.0f}"
        )


def print_cost_of_checkpoints(rounds: int = 3) -> None:
    """Prints how much longer `fit` takes with checkpoints, every few seconds, than without."""
    for (sizes, batch_size), seconds in zip(NETWORKS.items(), (1, 3), strict=True):
        data = make_data(sizes, batch_size)
        call = ours(sizes, batch_size)
        call()
        step_time = timing.time_side_by_side({"epoch": call})["epoch"] / STEPS
        every = max(1, round(seconds / step_time))
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in tqdm(range(2 * rounds + 2), unit="run"):
            directory = tempfile.mkdtemp() if i % 2 else None
            start = time.perf_counter()
            fc.train.fit(
                new_state(sizes, OPTIMIZER),
                data,
                loss_fn,
                OPTIMIZER,
                epochs=max(1, 2 * every // STEPS),
                batch_size=batch_size,
                checkpoint_dir=directory,
                checkpoint_every=every,
                progress=False,
            )
            if i >= 2:  # The first two compile.
                times[i % 2 == 1].append(time.perf_counter() - start)
            if directory is not None:
                shutil.rmtree(directory)
        ratios = [with_ / without for without, with_ in zip(*times.values(), strict=True)]
        print(
            f"{'-'.join(map(str, sizes))}: a checkpoint every {every} steps takes "
            f"{median(ratios) - 1:+.1%} time (median of {rounds} pairs, "
            f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})"
        )


if __name__ == "__main__":
    timing.run(
        {
            f"{'-'.join(map(str, sizes))}, batch {batch_size}, {STEPS} steps": partial(
                compare, sizes, batch_size
            )
            for sizes, batch_size in NETWORKS.items()
        },
        default_output="outputs/benchmarks/training.json",
    )
    print_share_of_peak()
    print_cost_of_checkpoints()
