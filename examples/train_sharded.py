"""Train the digits on one device, on several, or as several processes, with one result.

    python examples/train_sharded.py                 # one device
    python examples/train_sharded.py --devices 8     # eight, forced on the host's processor
    python examples/train_sharded.py --processes 4   # four processes on this host

The mesh has the axes data × model: the digits of a batch are sharded along the first, the weights
along the second. With several processes the script starts one of itself for each, and prints the
commands; with the address of a machine for `localhost`, those are what to run on several machines.
With `--checkpoint FILE` the first process saves the state after every epoch, and a run that was
killed resumes from there. At the end the first process trains once more on one device, and prints
how far the two are apart. The loop is written out here, because `fc.train.fit` reads whole arrays
on the host, and no process has the whole of an array that is sharded over several.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import fclayers as fc

SIZES = [64, 256, 256, 10]
TEST_DIGITS = 357
BATCH_SIZE = 128
# After a process has been silent for so long, the others end.
HEARTBEAT_SECONDS = 10


class Batches(NamedTuple):
    """Images (epochs, steps, batch, 64) in [0, 1] and labels (epochs, steps, batch) in 0..9."""

    images: Any
    labels: Any


class State(NamedTuple):
    """What training carries from step to step."""

    params: Any
    opt_state: optax.OptState


def load_batches(epochs: int) -> tuple[Batches, Batches]:
    """Returns the batches of every epoch, shuffled anew, and one batch of test digits."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    # Every process draws the same numbers, and keeps its share of what they choose.
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    steps = len(train) // BATCH_SIZE
    epoch_orders = [random.permutation(train)[: steps * BATCH_SIZE] for _ in range(epochs)]
    chosen = np.concatenate(epoch_orders).reshape(epochs, steps, BATCH_SIZE)
    return Batches(images[chosen], labels[chosen]), Batches(images[test], labels[test])


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of one batch."""
    logits = fc.apply_mlp(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames="optimizer")
def train_epoch(
    state: State, batches: Batches, *, optimizer: optax.GradientTransformation
) -> tuple[State, jax.Array]:
    """Takes a step for every batch; nothing in it says how many devices there are."""

    def step(state: State, batch: Batches) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, *batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    state, losses = jax.lax.scan(step, state, batches)
    return state, losses[-1]


@jax.jit
def accuracy(params: Any, test: Batches) -> jax.Array:
    """Share of digits classified correctly."""
    return (fc.apply_mlp(params, test.images).argmax(-1) == test.labels).mean()


def gather(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The whole arrays as NumPy's; every process takes part, also those that need none."""
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, P()))(tree)
    return jax.device_get(whole)


def scatter(host: np.ndarray, like: jax.Array) -> jax.Array:
    """Lays an array that every process has out as another one is."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: host[index])


def train_sharded(
    params: Any,
    batches: Batches,
    test: Batches,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    checkpoint: Path | None,
) -> tuple[Any, float, float]:
    """Trains on all devices; returns parameters as NumPy arrays, the last loss, the accuracy."""
    params = fc.shard(params, mesh, fc.mlp_specs(params))
    state = State(params, jax.jit(optimizer.init)(params))
    test = fc.shard(test, mesh, Batches(P(), P()))
    first = 0
    if checkpoint is not None and checkpoint.exists():
        saved = fc.interop.load_safetensors(checkpoint, {"state": state, "epochs": np.int32(0)})
        first = int(saved["epochs"])
        state = jax.tree.map(
            lambda host, like: scatter(np.asarray(host), like), saved["state"], state
        )
        if jax.process_index() == 0:
            print(f"Resumed     after epoch {first}", flush=True)
    loss = np.nan
    for epoch in range(first, len(batches.labels)):
        of_epoch = fc.shard(
            jax.tree.map(lambda a, epoch=epoch: a[epoch], batches),
            mesh,
            Batches(P(None, "data", None), P(None, "data")),
        )
        state, loss = train_epoch(state, of_epoch, optimizer=optimizer)
        if checkpoint is not None:
            whole = {"state": gather(state, mesh), "epochs": np.int32(epoch + 1)}
            if jax.process_index() == 0:
                fc.interop.save_safetensors(checkpoint, whole)
    whole = gather((state.params, loss, accuracy(state.params, test)), mesh)
    return whole[0], float(whole[1]), float(whole[2])


def run(epochs: int, model: int, checkpoint: Path | None) -> None:
    """Trains on all devices, and in the first process once more on one."""
    batches, test = load_batches(epochs)
    params = fc.init_mlp(jax.random.key(0), SIZES)
    steps = batches.labels.shape[0] * batches.labels.shape[1]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    mesh = jax.make_mesh((jax.device_count() // model, model), ("data", "model"))
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        trained, loss, share = train_sharded(params, batches, test, optimizer, mesh, checkpoint)
    if jax.process_index() > 0:
        return
    data = mesh.shape["data"]
    print(f"Mesh        data × model = {data} × {model}, processes: {jax.process_count()}")
    print(f"Loss        {loss:.4f} after {steps} steps")
    print(f"Accuracy    {share:.1%} of {TEST_DIGITS} test digits")
    print(f"Time        {time.perf_counter() - start:.1f} s, compilation included")

    alone = State(params, optimizer.init(params))
    for epoch in range(epochs):
        of_epoch = jax.tree.map(lambda a, epoch=epoch: a[epoch], batches)
        alone, _ = train_epoch(alone, of_epoch, optimizer=optimizer)
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(alone.params), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    share = float(accuracy(alone.params, test))
    print(f"One device  {share:.1%}, parameters at most {difference:.1e} apart")


def start_processes(args: argparse.Namespace) -> int:
    """Starts all processes on this host; the first that fails ends the others."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        address = f"localhost:{sock.getsockname()[1]}"
    commands = [
        [sys.executable, *sys.argv, "--coordinator", address, "--process-id", str(i)]
        for i in range(args.processes)
    ]
    print("One of these on every host:")
    for command in commands:
        print(f"  {shlex.join(command)}", flush=True)
    print(flush=True)
    processes = [subprocess.Popen(command) for command in commands]
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.returncode]
            if failed:
                return failed[0]
            time.sleep(0.1)
        return max(abs(process.returncode) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Starts what the arguments ask for, or trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12, help="passes over the digits")
    parser.add_argument("--devices", type=int, help="devices to force in every process")
    parser.add_argument("--processes", type=int, default=1, help="how many there are in all")
    parser.add_argument("--model", type=int, help="devices along the model axis (2, if even)")
    parser.add_argument("--checkpoint", type=Path, help="file on a disk of all processes")
    parser.add_argument("--coordinator", help="host:port of the first process")
    parser.add_argument("--process-id", type=int, help="which of the processes this one is")
    args = parser.parse_args()

    forced = f"--xla_force_host_platform_device_count={args.devices}"
    flags = os.environ.get("XLA_FLAGS", "")
    if args.devices and forced not in flags:
        # They can only be forced before JAX starts.
        environment = os.environ | {"XLA_FLAGS": f"{flags} {forced}".strip()}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if args.processes > 1 and args.process_id is None:
        sys.exit(start_processes(args))
    if args.processes > 1:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    model = args.model or 2 - jax.device_count() % 2
    if jax.device_count() % model or BATCH_SIZE % (jax.device_count() // model):
        parser.error(f"{jax.device_count()} devices are no mesh with a model axis of {model}")
    run(args.epochs, model, args.checkpoint)


if __name__ == "__main__":
    main()
