"""make_step, make_epoch and fit: against each other to the last bit, and against plain loops."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fclayers as fc
from fclayers.fitting import _prefetch

RNG = np.random.default_rng(0)
DATA = {"x": RNG.standard_normal((90, 6), np.float32), "y": RNG.integers(0, 3, 90)}
OPTIMIZER = optax.adam(1e-2)


def loss_fn(params, batch, key):
    logits = fc.apply_mlp(params, batch["x"], dropout_rate=0.1, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def square_loss(params, batch, key):
    return jnp.mean((fc.apply_linear(params, batch["x"])[..., 0] - batch["y"]) ** 2)


def new_state(optimizer=OPTIMIZER):
    params = fc.init_mlp(jax.random.key(0), [6, 8, 3])
    return fc.init_state(params, optimizer, jax.random.key(1))


def linear_state(optimizer):
    return fc.init_state(fc.init_linear(jax.random.key(0), 6, 1), optimizer, jax.random.key(1))


def bits(tree):
    """All arrays as bytes; equal lists are equal to the last bit."""
    leaves = (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
    )
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def run_fit(state, *arguments, epochs=2, batch_size=32, progress=False, **others):
    return fc.fit(
        state, *arguments, epochs=epochs, batch_size=batch_size, progress=progress, **others
    )


CASES = {
    "mlp, adam": (new_state, loss_fn, OPTIMIZER, {}),
    "in parts": (linear_state, square_loss, optax.sgd(0.1, 0.9), {"accumulate": 3}),
    "in order": (linear_state, square_loss, optax.flatten(optax.adam(0.1)), {"shuffle": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_epoch_and_fit_are_the_loop_of_steps_to_the_last_bit(name):
    make_state, loss, optimizer, arguments = CASES[name]
    step = fc.make_step(loss, optimizer, accumulate=arguments.get("accumulate", 1))
    state, losses = make_state(optimizer), []
    for _ in range(2):
        order = np.arange(90)
        if arguments.get("shuffle", True):
            order = np.asarray(fc.epoch_order(state, 90, batch_size=32))
        for i in range(0, 90, 32):
            batch = {key: values[order[i : i + 32]] for key, values in DATA.items()}
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])

    epoch = fc.make_epoch(loss, optimizer, batch_size=32, **arguments)
    by_epochs, first = epoch(make_state(optimizer), DATA)
    by_epochs, second = epoch(by_epochs, DATA)
    assert bits(by_epochs) == bits(state)
    assert bits([*first["loss"], *second["loss"]]) == bits(losses)

    for chunk_size in (None, 1, 64, 1000):
        fitted, history = run_fit(
            make_state(optimizer), DATA, loss, optimizer, chunk_size=chunk_size, **arguments
        )
        assert bits(fitted) == bits(state), chunk_size
        assert bits(list(history.steps["loss"])) == bits(losses), chunk_size


def test_pieces_between_checkpoints_change_nothing(tmp_path):
    expected, history = run_fit(new_state(), DATA, loss_fn, OPTIMIZER, epochs=4)
    state, pieced = run_fit(
        new_state(),
        DATA,
        loss_fn,
        OPTIMIZER,
        epochs=4,
        chunk_size=32,
        checkpoint_dir=tmp_path,
        checkpoint_every=5,
    )
    assert bits(state) == bits(expected)
    assert bits(pieced) == bits(history)


def test_steps_are_those_of_a_plain_loop():
    step, state = fc.make_step(square_loss, OPTIMIZER), linear_state(OPTIMIZER)
    params = fc.init_linear(jax.random.key(0), 6, 1)
    opt_state = OPTIMIZER.init(params)
    for _ in range(5):
        state, metrics = step(state, DATA)
        loss, gradients = jax.value_and_grad(square_loss)(params, DATA, None)
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)
    assert state.step == 5


@pytest.mark.parametrize(("samples", "batch_size"), [(90, 32), (64, 32), (7, 32), (5, 1)])
def test_every_sample_counts_once(samples, batch_size):
    def loss(params, batch, key):
        return params[batch].sum()

    optimizer = optax.sgd(1.0)
    data = np.arange(samples)
    for epochs in (1, 2):
        state = fc.init_state(jnp.zeros(samples), optimizer, jax.random.key(1))
        state, history = run_fit(
            state, data, loss, optimizer, epochs=epochs, batch_size=batch_size, chunk_size=40
        )
        np.testing.assert_array_equal(state.params, np.full(samples, -epochs))
        assert state.step == len(history.steps["loss"]) == epochs * -(-samples // batch_size)


@pytest.mark.parametrize("accumulate", [2, 4, 7, 1000])
def test_accumulated_gradients_are_those_of_the_batch(accumulate):
    optimizer = optax.sgd(1.0)
    whole, _ = fc.make_step(square_loss, optimizer)(linear_state(optimizer), DATA)
    state, metrics = fc.make_step(square_loss, optimizer, accumulate=accumulate)(
        linear_state(optimizer), DATA
    )
    chex.assert_trees_all_close(state.params, whole.params, rtol=1e-4, atol=1e-5)
    expected = square_loss(linear_state(optimizer).params, DATA, None)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_parts_have_keys_of_their_own():
    def loss(params, batch, key):
        draw = jax.random.uniform(key)
        return params * 0, {"draw": draw, "square": draw**2}

    optimizer = optax.sgd(1.0)
    step = fc.make_step(loss, optimizer, accumulate=4)
    state = fc.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
    state, first = step(state, jnp.ones(8))
    _, second = step(state, jnp.ones(8))
    assert first["square"] - first["draw"] ** 2 > 1e-3
    assert first["draw"] != second["draw"]


def test_orders():
    state = new_state()
    orders = [
        tuple(fc.epoch_order(state._replace(step=jnp.int32(i)), 90, batch_size=32).tolist())
        for i in range(6)
    ]
    assert orders[0] == orders[1] == orders[2] != orders[3] == orders[4] == orders[5]
    assert all(sorted(order) == list(range(90)) for order in orders)


def test_what_the_caller_holds_stays():
    def pull_back(gradients, start, params):
        return jax.tree.map(lambda g, p, s: -0.1 * (g + p - s), gradients, params, start), start

    optimizer = optax.GradientTransformation(lambda params: params, pull_back)
    params = fc.init_linear(jax.random.key(0), 6, 1)
    before = jax.tree.map(np.array, params)
    state = fc.init_state(params, optimizer, jax.random.key(1))
    fitted, _ = run_fit(state, DATA, square_loss, optimizer, epochs=1)
    assert bits(params) == bits(state.params) == bits(state.opt_state) == bits(before)
    assert bits(fitted.opt_state) == bits(before) != bits(fitted.params)


def test_memory_maps_and_jax_arrays(tmp_path):
    expected, _ = run_fit(new_state(), DATA, loss_fn, OPTIMIZER)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(90, 6))
    x[:] = DATA["x"]
    for data in ({**DATA, "x": x}, jax.tree.map(jnp.asarray, DATA)):
        for chunk_size in (None, 32):
            state, _ = run_fit(new_state(), data, loss_fn, OPTIMIZER, chunk_size=chunk_size)
            assert bits(state) == bits(expected)


def test_the_next_chunk_is_made_while_one_is_in_use():
    made = [threading.Event() for _ in range(3)]

    def chunks():
        for event in made:
            event.set()
            yield event

    for i, _ in enumerate(_prefetch(chunks())):
        assert i == 2 or made[i + 1].wait(10)
    assert i == 2


def test_history_callbacks_and_picture(tmp_path):
    called = []
    _, history = run_fit(
        new_state(),
        DATA,
        loss_fn,
        OPTIMIZER,
        epochs=3,
        eval_fn=lambda params: {"accuracy": jnp.float32(0.5), "size": 7},
        callbacks=[lambda epoch, state, metrics: called.append((epoch, int(state.step), metrics))],
    )
    assert history.steps_per_epoch == 3
    assert {key: values.shape for key, values in history.steps.items()} == {
        "loss": (9,),
        "accuracy": (9,),
    }
    expected = [
        np.average(history.steps["loss"][i : i + 3], weights=[32, 32, 26]) for i in (0, 3, 6)
    ]
    np.testing.assert_allclose(history.epochs["train_loss"], expected, rtol=1e-6)
    np.testing.assert_array_equal(history.epochs["accuracy"], [0.5] * 3)
    assert [(epoch, step) for epoch, step, _ in called] == [(0, 3), (1, 6), (2, 9)]
    for epoch, _, metrics in called:
        assert metrics == {key: values[epoch] for key, values in history.epochs.items()}

    history.plot(tmp_path / "new" / "history.png")
    assert (tmp_path / "new" / "history.png").read_bytes().startswith(b"\x89PNG")


def test_progress_shows_loss_accuracy_and_speed(capfd):
    run_fit(new_state(), DATA, loss_fn, OPTIMIZER, progress=True)
    printed = capfd.readouterr().err.split("\r")[-1]
    for text in ("180/180", " samples/s", "epoch=2/2", "loss=", "accuracy="):
        assert text in printed


@pytest.mark.parametrize(
    ("mode", "patience", "epochs"), [("min", 2, 4), ("min", 3, 8), ("max", 2, 3), ("max", 9, 8)]
)
def test_early_stopping(mode, patience, epochs):
    values = iter([3.0, 2, 2, 2.5, 1.5, 2, 2, 2])
    state, history = run_fit(
        linear_state(OPTIMIZER),
        DATA,
        square_loss,
        OPTIMIZER,
        epochs=8,
        eval_fn=lambda params: {"value": next(values)},
        patience=patience,
        monitor="value",
        mode=mode,
    )
    assert len(history.epochs["value"]) == epochs
    assert state.step == 3 * len(history.epochs["value"])


def test_a_nan_loss_stops_and_names_the_step_and_the_checkpoint(tmp_path):
    def loss(params, batch, key):
        return jnp.where(params > 6.5, jnp.nan, 1.0) * -params

    optimizer = optax.sgd(1.0)
    state = fc.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
    with pytest.raises(FloatingPointError, match=r"fit: .* NaN at step 7 .* checkpoint is none"):
        run_fit(state, DATA, loss, optimizer, epochs=9)
    message = rf"NaN at step 7 .* the last good checkpoint is {tmp_path}/6$"
    with pytest.raises(FloatingPointError, match=message):
        run_fit(state, DATA, loss, optimizer, epochs=9, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6"]


def test_a_nan_gradient_is_no_checkpoint(tmp_path):
    def loss(params, batch, key):
        return jnp.sqrt(params)

    # The gradient at 0 is infinite; clipped by its norm it is NaN.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = fc.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
    with pytest.raises(FloatingPointError, match=r"params has NaN after step 0 .* is none"):
        run_fit(state, DATA, loss, optimizer, epochs=1, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not list(tmp_path.iterdir())


STEP = fc.make_step(square_loss, OPTIMIZER)
BAD = {
    "key": (
        lambda: fc.init_state({}, OPTIMIZER, 0),
        TypeError,
        "init_state: expected one key from jax.random.key, got 0 of type int",
    ),
    "optimizer": (
        lambda: fc.make_step(loss_fn, optax.adam),
        TypeError,
        "make_step: expected optimizer to be an optax optimizer, got function",
    ),
    "loss function": (
        lambda: fc.make_epoch(1.0, OPTIMIZER, batch_size=3),
        TypeError,
        r"make_epoch: expected loss_fn to be a function \(params, batch, key\) -> loss, got 1\.0",
    ),
    "accumulate": (
        lambda: fc.make_step(loss_fn, OPTIMIZER, accumulate=0),
        ValueError,
        "make_step: accumulate must be at least 1, got 0",
    ),
    "batch size": (
        lambda: fc.make_epoch(loss_fn, OPTIMIZER, batch_size=2.5),
        ValueError,
        r"make_epoch: batch_size must be an integer >= 0, got 2\.5",
    ),
    "loss of every sample": (
        lambda: fc.make_step(lambda params, x, key: x, OPTIMIZER)(new_state(), jnp.ones(4)),
        ValueError,
        r"make_step: expected loss_fn to return scalars, got 'loss' as an array of shape \(4,\)",
    ),
    "different numbers of samples": (
        lambda: STEP(linear_state(OPTIMIZER), {**DATA, "y": DATA["y"][1:]}),
        ValueError,
        r"make_step: expected arrays with the same .* \['x'\] has 90, \['y'\] has 89",
    ),
    "a scalar": (
        lambda: STEP(linear_state(OPTIMIZER), {**DATA, "y": 1.0}),
        ValueError,
        r"make_step: expected arrays with the same number of samples .* \['y'\] has None",
    ),
    "no data": (
        lambda: run_fit(new_state(), {}, loss_fn, OPTIMIZER),
        ValueError,
        "fit: expected arrays with the same number of samples .* there are no arrays",
    ),
    "no samples": (
        lambda: run_fit(new_state(), np.ones((0, 3)), loss_fn, OPTIMIZER),
        ValueError,
        "fit: expected at least one sample, got none",
    ),
    "epochs": (
        lambda: run_fit(new_state(), DATA, loss_fn, OPTIMIZER, epochs=-1),
        ValueError,
        "fit: epochs must be an integer >= 0, got -1",
    ),
    "chunk size": (
        lambda: run_fit(new_state(), DATA, loss_fn, OPTIMIZER, chunk_size=0),
        ValueError,
        "fit: chunk_size must be at least 1, got 0",
    ),
    "mode": (
        lambda: run_fit(new_state(), DATA, loss_fn, OPTIMIZER, mode="best"),
        ValueError,
        "fit: mode must be 'min' or 'max', got 'best'",
    ),
    "monitor": (
        lambda: run_fit(
            linear_state(OPTIMIZER), DATA, square_loss, OPTIMIZER, patience=1, monitor="loss"
        ),
        ValueError,
        "fit: monitor must be one of 'train_loss', got 'loss'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_error(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
