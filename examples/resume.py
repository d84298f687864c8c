"""Kill a training run in the middle, start it again, and end with the same bits.

Three processes: one trains without a break, one kills itself on the way, one resumes from its
checkpoints. Run it with `python examples/resume.py`; `--help` explains the flags.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from common import accuracy, digits, loss_fn, positive

import fclayers as fc


def train(directory: Path, epochs: int, kill_at: int | None) -> str:
    """Trains to the end, or kills this process after an epoch; returns a hash of all results."""
    data, val, _ = digits(seed=0)
    optimizer = optax.adam(1e-3)
    params = fc.init_mlp(jax.random.key(0), [64, 128, 128, 10])
    state = fc.train.init_state(params, optimizer, jax.random.key(1))
    print(f"  process {os.getpid()}, checkpoints in {directory}", flush=True)

    def kill(epoch, state, metrics):
        if epoch == kill_at:
            print(f"  killed at step {state.step}, loss {metrics['train_loss']:.4f}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    state, history = fc.train.fit(
        state,
        data,
        loss_fn,
        optimizer,
        epochs=epochs,
        batch_size=64,
        eval_fn=lambda params: {"accuracy": accuracy(params, val)},
        callbacks=[kill],
        checkpoint_dir=directory,
        checkpoint_every=50,
    )
    history.plot(directory.parent / f"{directory.name}.png")
    print(f"  ended at step {state.step}, loss {history.epochs['train_loss'][-1]:.4f}")
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((state._replace(key=jax.random.key_data(state.key)), history)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def run(directory: Path, epochs: int, kill_at: int | None = None) -> subprocess.CompletedProcess:
    """Trains in a process of its own, and passes on what it prints."""
    command = [sys.executable, __file__, "--epochs", str(epochs), "--train", str(directory)]
    if kill_at is not None:
        command += ["--kill-at", str(kill_at)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    return done


def main(argv: list[str] | None = None) -> bool:
    """Returns whether the killed run ended as the one without a break."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=positive, default=20, help="passes over the digits")
    parser.add_argument("--output", type=Path, default=Path("outputs/resume"), help="a new folder")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error("--epochs must be at least 2")
    if args.train:
        print(f"  results {train(args.train, args.epochs, args.kill_at)}")
        return True

    whole, broken = args.output / "whole", args.output / "broken"
    for directory in (whole, broken):
        shutil.rmtree(directory, ignore_errors=True)
    print("Without a break")
    expected = run(whole, args.epochs)
    expected.check_returncode()
    print("Killed in the middle")
    killed = run(broken, args.epochs, args.epochs // 2)
    print("Started again")
    resumed = run(broken, args.epochs)
    resumed.check_returncode()
    same = resumed.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1]
    print(
        f"\nSIGKILL ended the first attempt: {killed.returncode == -signal.SIGKILL}"
        f"\nParameters, optimizer state and history are the same to the last bit: {same}"
    )
    return same and killed.returncode == -signal.SIGKILL


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
