"""Train the digits on one device, on several, or as several processes, with one result.

    python examples/train_sharded.py                 # one device
    python examples/train_sharded.py --devices 8     # eight, forced on the host's processor
    python examples/train_sharded.py --processes 4   # four processes on this host

The mesh has the axes data × model: the digits of a batch are divided along the first, the weights
along the second. With several processes the script starts one of itself for each, and prints the
commands; with the address of a machine for `localhost`, those are what to run on several machines.
At the end the first process trains once more on one device, and prints how far the two are apart.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from functools import partial
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
    """Images (steps, batch, 64) with values in [0, 1] and labels (steps, batch) in 0..9."""

    images: Any
    labels: Any


class Result(NamedTuple):
    """Loss of the last step, test accuracy, and the trained parameters."""

    loss: jax.Array
    accuracy: jax.Array
    params: Any


def load_batches(epochs: int) -> tuple[Batches, Batches]:
    """Returns all batches of the training, shuffled anew every epoch, and one of test digits."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype(np.float32) / 16, labels.astype(np.int32)
    # Every process draws the same numbers, and keeps its share of what they choose.
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    steps = len(train) // BATCH_SIZE
    epoch_orders = [random.permutation(train)[: steps * BATCH_SIZE] for _ in range(epochs)]
    chosen = np.concatenate(epoch_orders).reshape(epochs * steps, BATCH_SIZE)
    return Batches(images[chosen], labels[chosen]), Batches(images[test], labels[test])


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of one batch."""
    logits = fc.apply_mlp(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames="optimizer")
def train(
    params: Any, batches: Batches, test: Batches, *, optimizer: optax.GradientTransformation
) -> Result:
    """Takes a step for every batch; nothing in it says how many devices there are."""

    def step(carry: Any, batch: Batches) -> Any:
        params, opt_state = carry
        loss, gradients = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    right = fc.apply_mlp(params, test.images).argmax(-1) == test.labels
    return Result(losses[-1], right.mean(), params)


def run(epochs: int, model: int) -> float:
    """Trains on all devices; returns how far one device's parameters are from the result."""
    batches, test = load_batches(epochs)
    params = fc.init_mlp(jax.random.key(0), SIZES)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, len(batches.labels)))

    mesh = jax.make_mesh((jax.device_count() // model, model), ("data", "model"))
    specs = (
        fc.mlp_specs(params),
        Batches(P(None, "data", None), P(None, "data")),
        Batches(P(), P()),
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        result = train(*fc.shard((params, batches, test), mesh, specs), optimizer=optimizer)
        # Every process takes part in the gathering, also those that print nothing.
        gathered = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, P()))(result)
        sharded = jax.device_get(gathered)
    if jax.process_index() > 0:
        return 0.0
    data = mesh.shape["data"]
    print(f"Mesh        data × model = {data} × {model}, processes: {jax.process_count()}")
    print(f"Loss        {sharded.loss:.4f} after {len(batches.labels)} steps")
    print(f"Accuracy    {sharded.accuracy:.1%} of {TEST_DIGITS} test digits")
    print(f"Time        {time.perf_counter() - start:.1f} s, compilation included")

    alone = jax.device_get(train(params, batches, test, optimizer=optimizer))
    pairs = zip(jax.tree.leaves(sharded.params), jax.tree.leaves(alone.params), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    print(f"One device  {alone.accuracy:.1%}, parameters at most {difference:.1e} apart")
    return difference


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
    run(args.epochs, model)


if __name__ == "__main__":
    main()
