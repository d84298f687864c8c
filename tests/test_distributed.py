"""Several processes: the results of one, and an end to all of them when one is killed.

As a script, this file is one of the processes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fclayers as fc

pytestmark = pytest.mark.slow

# CI runs with 4 as well.
PROCESSES = int(os.environ.get("DISTRIBUTED_PROCESSES", "2"))
HEARTBEAT_SECONDS = 5
EXAMPLE = Path(__file__).parent.parent / "examples" / "train_sharded.py"


def train(params, x, labels):
    """Logits, five Adam steps and their gradients."""
    optimizer = optax.adam(1e-2)

    def loss(params):
        hidden = fc.apply_mlp(params[:-1], x, final_activation=jax.nn.relu)
        return fc.linear_cross_entropy(params[-1], hidden, labels, reduction="mean")

    def step(carry, _):
        params, opt_state = carry
        gradients = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state), gradients

    return fc.apply_mlp(params, x), jax.lax.scan(step, (params, optimizer.init(params)), length=5)


def run_process(process_id, num_processes, port, killed):
    jax.distributed.initialize(
        f"localhost:{port}",
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    params = fc.init_mlp(jax.random.key(0), [16, 32, 24, 8])
    x = np.asarray(jax.random.normal(jax.random.key(1), (16, 16)))
    labels = np.asarray(jax.random.randint(jax.random.key(2), (16,), 0, 8))
    expected = jax.jit(train)(params, x, labels)
    specs = *fc.mlp_specs(params[:2]), fc.partition_specs(params[2], "column")
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        shape = num_processes // 2, 2
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)
        with jax.set_mesh(mesh):
            args = fc.shard((params, x, labels), mesh, (specs, P("data", None), P("data")))
            actual = jax.jit(train)(*args)
        weight = actual[1][0][0][0].weight
        assert not weight.is_fully_addressable
        whole = fc.shard(weight, mesh, P()).addressable_data(0)
        np.testing.assert_allclose(whole, expected[1][0][0][0].weight, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            for part in ours.addressable_shards:
                np.testing.assert_allclose(part.data, theirs[part.index], rtol=1e-5, atol=1e-5)
    print("equal", flush=True)
    if process_id == killed:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        with jax.set_mesh(mesh):
            jax.block_until_ready(jax.jit(train)(*args))


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


# The first process is the coordinator, which the others notice in another way.
@pytest.mark.parametrize("killed", [PROCESSES - 1, 0] if PROCESSES > 2 else [PROCESSES - 1])
def test_processes_agree_with_one_and_end_when_one_is_killed(tmp_path, killed):
    port = free_port()
    logs = [tmp_path / f"{i}.log" for i in range(PROCESSES)]
    processes = []
    for i, log in enumerate(logs):
        command = [sys.executable, __file__, *map(str, (i, PROCESSES, port, killed))]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    try:
        assert processes[killed].wait(120) == -signal.SIGKILL, logs[killed].read_text()[-3000:]
        start = time.monotonic()
        codes = [process.wait(60) for process in processes if process is not processes[killed]]
        took = time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for log in logs:
        assert "equal\n" in log.read_text(), log.read_text()[-3000:]
    assert all(codes), codes
    # The heartbeats' time, and as much for a process to stop on a busy machine.
    assert took < 2 * HEARTBEAT_SECONDS + 20
    print(f"the others ended {took:.1f} s after it")
    texts = [log.read_text() for i, log in enumerate(logs) if i != killed]
    assert all("Gloo all-reduce failed" in text or "another task died" in text for text in texts)


def run_example(*arguments):
    command = [sys.executable, str(EXAMPLE), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize(
    ("arguments", "mesh"),
    [
        (("--devices", "8"), "4 × 2, processes: 1"),
        (("--processes", str(PROCESSES)), f"{PROCESSES // 2} × 2, processes: {PROCESSES}"),
    ],
)
def test_the_example_has_one_result(arguments, mesh):
    printed = run_example(*arguments, "--epochs", "4")
    assert mesh in printed
    accuracy, alone = re.findall(r"(\S+)%", printed)
    assert accuracy == alone
    assert float(accuracy) > 90
    assert float(re.search(r"at most (\S+) apart", printed)[1]) <= 1e-5


def test_the_example_goes_on_after_a_process_was_killed(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    arguments = ("--processes", str(PROCESSES), "--epochs", "8", "--checkpoint", str(checkpoint))
    run = subprocess.Popen([sys.executable, str(EXAMPLE), *arguments], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not checkpoint.exists():
            assert run.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert run.wait(60)
    finally:
        run.kill()
        run.wait()
    printed = run_example(*arguments)
    assert re.search(r"Resumed     after epoch [1-8]\n", printed)
    assert float(re.search(r"at most (\S+) apart", printed)[1]) <= 1e-5


def test_the_example_ends_with_an_error_when_a_process_has_one():
    command = [sys.executable, str(EXAMPLE), "--processes", "2", "--model", "3"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode
    assert "2 devices are no mesh with a model axis of 3" in run.stderr


if __name__ == "__main__":
    run_process(*map(int, sys.argv[1:]))
