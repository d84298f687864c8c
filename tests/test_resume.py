"""Runs that are killed, damaged or out of disk space end as if nothing had happened, or say so.

As a script, `python tests/test_resume.py DIRECTORY NUMBER SECONDS` trains and kills itself.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fclayers as fc
from fclayers.train import checkpoints

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RESUME_KILLS", "3"))
RNG = np.random.default_rng(0)
DATA = {"x": RNG.standard_normal((90, 6), np.float32), "y": RNG.standard_normal((90, 1))}
OPTIMIZER = optax.adam(1e-2)


def loss_fn(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    errors = (fc.apply_linear(params, x) - batch["y"]) ** 2
    return errors.mean(), {"worst": errors.max()}


def new_state():
    return fc.train.init_state(
        fc.init_linear(jax.random.key(0), 6, 1), OPTIMIZER, jax.random.key(1)
    )


def run_fit(directory, *, epochs=12, **others):
    arguments = {"batch_size": 16, "checkpoint_every": 4, "chunk_size": 32, **others}
    return fc.train.fit(
        new_state(),
        DATA,
        loss_fn,
        OPTIMIZER,
        epochs=epochs,
        eval_fn=lambda params: {"norm": jnp.abs(params.weight).sum()},
        checkpoint_dir=directory,
        progress=False,
        **arguments,
    )


def digest(result):
    """A hash of all bits of a state and a history."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(result):
        if jnp.issubdtype(getattr(leaf, "dtype", int), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        hashed.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()


def kill_self_after(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory, number, seconds):
    """Trains, and kills itself so many seconds after the checkpoint of this number is begun."""
    write = checkpoints._write

    def write_and_die(*arguments):
        nonlocal number
        number -= 1
        if number == 0:
            threading.Thread(target=kill_self_after, args=(seconds,), daemon=True).start()
        write(*arguments)

    checkpoints._write = write_and_die
    print(digest(run_fit(directory)))


def test_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    expected = digest(run_fit(None))
    rng, kills, finished = random.Random(0), 0, 0
    directory = tmp_path / "checkpoints"
    while kills < KILLS or not finished:
        # While a checkpoint is written, which takes some 0.03 seconds, or anywhere.
        moment = rng.choice([(rng.randint(1, 15), rng.uniform(0, 0.03)), (1, rng.uniform(0, 1))])
        if kills == KILLS:
            moment = (0, 0)
        run = subprocess.run(
            [sys.executable, __file__, directory, *map(str, moment)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if run.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == expected, moment
        assert "damaged" not in run.stderr
        finished += 1
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    """Checkpoints of the steps 12, 16 and 18, and what six epochs end with."""
    directory = tmp_path_factory.mktemp("run") / "new" / "checkpoints"
    run_fit(directory, epochs=3)
    return directory, digest(run_fit(None, epochs=6))


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_a_longer_run_goes_on(three_epochs, tmp_path):
    directory, expected = three_epochs
    assert steps_in(directory) == [12, 16, 18]
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    assert digest(run_fit(tmp_path, epochs=6, keep=2)) == expected
    assert steps_in(tmp_path) == [32, 36]


def test_a_finished_run_is_read_and_does_nothing(three_epochs):
    directory, _ = three_epochs
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert digest(run_fit(directory, epochs=3)) == digest(run_fit(None, epochs=3))
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_chunks_may_change_between_runs(three_epochs, tmp_path):
    directory, expected = three_epochs
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "18")
    assert digest(run_fit(tmp_path, epochs=6, chunk_size=None, checkpoint_every=7)) == expected


def flip_a_byte(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 16
    path.write_bytes(contents)


def files_of(step):
    return sorted(
        (path for path in step.rglob("*") if path.is_file() and path.stat().st_size),
        key=lambda path: path.stat().st_size,
    )


def data_of(step):
    return max((step / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)


# Where orbax finds one array damaged, it leaves the reads of the others behind.
leaves_reads_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGE = {
    "a flipped byte": lambda step: flip_a_byte(data_of(step)),
    "half the data": lambda step: os.truncate(data_of(step), data_of(step).stat().st_size // 2),
    "no data": lambda step: data_of(step).unlink(),
    "everything empty": lambda step: [os.truncate(path, 0) for path in files_of(step)],
    "nothing in it": lambda step: [shutil.rmtree(step), step.mkdir()],
    "other numbers": lambda step: flip_a_byte(step / "about" / "metadata"),
}


@leaves_reads_behind
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    three_epochs, tmp_path, damage
):
    directory, expected = three_epochs
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "18")
    message = rf"fit: the checkpoint {tmp_path}/18 is damaged and is now {tmp_path}/damaged-18; the"
    with pytest.warns(UserWarning, match=message):
        assert digest(run_fit(tmp_path, epochs=6)) == expected
    assert (tmp_path / "damaged-18").exists()


@leaves_reads_behind
def test_a_truncated_file_is_noticed_or_not_needed(three_epochs, tmp_path):
    directory, _ = three_epochs
    expected, damaged = digest(run_fit(None, epochs=3)), []
    for i, path in enumerate(files_of(directory / "18")):
        copy = tmp_path / str(i)
        shutil.copytree(directory, copy)
        os.truncate(copy / path.relative_to(directory), path.stat().st_size // 2)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert digest(run_fit(copy, epochs=3)) == expected
        assert len(warned) == (copy / "damaged-18").exists()
        damaged += [path.name] * len(warned)
    assert {"manifest.ocdbt", "metadata", data_of(directory / "18").name} <= set(damaged)


@leaves_reads_behind
def test_only_damaged_checkpoints_begin_anew(three_epochs, tmp_path):
    directory, expected = three_epochs
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    for step in (12, 16, 18):
        DAMAGE["no data"](tmp_path / str(step))
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert digest(run_fit(tmp_path, epochs=6)) == expected
    assert len(warned) == 3


def test_checkpoints_of_another_run_are_refused(three_epochs, tmp_path):
    directory, _ = three_epochs
    message = r"fit: .*18 is of another run:\n  batch_size was 16, is 8$"
    with pytest.raises(ValueError, match=message):
        run_fit(directory, batch_size=8)
    assert steps_in(directory) == [12, 16, 18]


def test_a_full_disk_is_an_error_and_the_last_good_checkpoint_stays(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        run_fit(tmp_path, epochs=2)
        steps = steps_in(tmp_path)
        filler = tmp_path / "filler"
        with filler.open("wb", 0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        message = rf"fit: the checkpoint of step 16 could not be written to {tmp_path}; the last "
        with pytest.raises(OSError, match=rf"{message}good checkpoint is {tmp_path}/12\."):
            run_fit(tmp_path, epochs=6)
        assert steps_in(tmp_path) == steps
        filler.unlink()
        assert digest(run_fit(tmp_path, epochs=6)) == digest(run_fit(None, epochs=6))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_every_kind_of_array_comes_back(tmp_path):
    with jax.enable_x64(True):
        params = {
            "half/": jnp.arange(3, dtype=jnp.bfloat16),
            "double": (jnp.full((2, 2), 1e-300, jnp.float64), None),
            "none": jnp.zeros((0, 4)),
            "complex": jnp.array([1 + 2j, -0.0]),
        }
        optimizer = optax.sgd(0.1, 0.9)

        def loss(params, batch, key):
            return sum(jnp.abs(a).sum().astype(float) for a in jax.tree.leaves(params))

        run = partial(
            fc.train.fit,
            data=np.ones(8),
            loss_fn=loss,
            optimizer=optimizer,
            batch_size=4,
            progress=False,
        )
        for key in (jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3)):
            state = fc.train.init_state(params, optimizer, key)
            whole = run(state, epochs=3)
            directory = tmp_path / str(key.shape)
            run(state, epochs=1, checkpoint_dir=directory)
            resumed = run(state, epochs=3, checkpoint_dir=directory)
            assert digest(resumed) == digest(whole)


def test_early_stopping_goes_on_where_it_was(tmp_path):
    def run(directory, epochs):
        return run_fit(directory, epochs=epochs, patience=2, monitor="norm", mode="max")

    whole = run(None, 12)
    run(tmp_path, 2)
    assert digest(run(tmp_path, 12)) == digest(whole)
    assert digest(run(tmp_path, 12)) == digest(whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
