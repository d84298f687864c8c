"""make_step, make_epoch and fit: against each other to the last bit, and against plain loops."""

import functools
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_calls import bad_calls

import fclayers as fc
from fclayers.train.epoch import prefetch

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
    return fc.train.init_state(params, optimizer, jax.random.key(1))


def linear_state(optimizer):
    return fc.train.init_state(
        fc.init_linear(jax.random.key(0), 6, 1), optimizer, jax.random.key(1)
    )


def bits(tree):
    """All arrays as bytes; equal lists are equal to the last bit."""
    leaves = (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
    )
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def run_fit(state, *arguments, epochs=2, batch_size=32, progress=False, **others):
    return fc.train.fit(
        state, *arguments, epochs=epochs, batch_size=batch_size, progress=progress, **others
    )


CASES = {
    "mlp, adam": (new_state, loss_fn, OPTIMIZER, {}),
    "in parts": (linear_state, square_loss, optax.sgd(0.1, 0.9), {"accumulate": 3}),
    "in order": (linear_state, square_loss, optax.flatten(optax.adam(0.1)), {"shuffle": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_epoch_and_fit_are_the_loop_of_steps_to_the_last_bit(name):
    make_state, loss, optimizer, arguments = CASES[name]
    step = fc.train.make_step(loss, optimizer, accumulate=arguments.get("accumulate", 1))
    state, losses = make_state(optimizer), []
    for number in range(2):
        order = np.arange(90)
        if arguments.get("shuffle", True):
            order = np.asarray(fc.train.epoch_order(state.key, number, 90))
        for i in range(0, 90, 32):
            batch = {key: values[order[i : i + 32]] for key, values in DATA.items()}
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])

    epoch = fc.train.make_epoch(loss, optimizer, batch_size=32, **arguments)
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
    step, state = fc.train.make_step(square_loss, OPTIMIZER), linear_state(OPTIMIZER)
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
        state = fc.train.init_state(jnp.zeros(samples), optimizer, jax.random.key(1))
        state, history = run_fit(
            state, data, loss, optimizer, epochs=epochs, batch_size=batch_size, chunk_size=40
        )
        np.testing.assert_array_equal(state.params, np.full(samples, -epochs))
        assert state.step == len(history.steps["loss"]) == epochs * -(-samples // batch_size)


@pytest.mark.parametrize("accumulate", [2, 4, 7, 1000])
def test_accumulated_gradients_are_those_of_the_batch(accumulate):
    optimizer = optax.sgd(1.0)
    whole, _ = fc.train.make_step(square_loss, optimizer)(linear_state(optimizer), DATA)
    state, metrics = fc.train.make_step(square_loss, optimizer, accumulate=accumulate)(
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
    step = fc.train.make_step(loss, optimizer, accumulate=4)
    state = fc.train.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
    state, first = step(state, jnp.ones(8))
    _, second = step(state, jnp.ones(8))
    assert first["square"] - first["draw"] ** 2 > 1e-3
    assert first["draw"] != second["draw"]


def test_orders():
    key = jax.random.key(1)
    orders = [tuple(fc.train.epoch_order(key, epoch, 90).tolist()) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(90)) for order in orders)
    assert fc.train.epoch_order(key, jnp.int32(1), 90).tolist() == list(orders[1])
    # Pinned, so that a run resumes with a later version.
    assert fc.train.epoch_order(key, 2, 6).tolist() == [5, 0, 1, 2, 4, 3]


def test_what_the_caller_holds_stays():
    def pull_back(gradients, start, params):
        return jax.tree.map(lambda g, p, s: -0.1 * (g + p - s), gradients, params, start), start

    optimizer = optax.GradientTransformation(lambda params: params, pull_back)
    params = fc.init_linear(jax.random.key(0), 6, 1)
    before = jax.tree.map(np.array, params)
    state = fc.train.init_state(params, optimizer, jax.random.key(1))
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

    for i, _ in enumerate(prefetch(chunks())):
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
    state = fc.train.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
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
    state = fc.train.init_state(jnp.zeros(()), optimizer, jax.random.key(1))
    with pytest.raises(FloatingPointError, match=r"params has NaN after step 0 .* is none"):
        run_fit(state, DATA, loss, optimizer, epochs=1, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not list(tmp_path.iterdir())


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    state, _ = run_fit(new_state(), DATA, loss_fn, OPTIMIZER, progress=True)
    assert state.step == 6
    assert capfd.readouterr().err == ""


INT8 = {
    "values": jnp.arange(-9, 9, dtype=jnp.int8).reshape(6, 3),
    "scale": jnp.full(3, 0.1),
    "adapter": (jnp.ones((6, 2)), jnp.full((2, 3), 0.1)),
    "switch": jnp.array([True, False, True]),
    "none": None,
}
FLOATS = jax.tree.map(lambda a: jnp.issubdtype(a.dtype, jnp.inexact), INT8)
ADAPTER = {**jax.tree.map(lambda _: False, INT8), "adapter": (True, True)}
FROZEN = {"values", "switch"}
MIXED_OPTIMIZERS = {
    "adam": (optax.adam(0.1), FROZEN),
    "adamw": (optax.adamw(0.1, weight_decay=0.1, mask=jax.tree.map(lambda _: True, INT8)), FROZEN),
    "flatten": (optax.flatten(optax.adam(0.1)), FROZEN),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)), FROZEN),
    "multi steps": (optax.MultiSteps(optax.adam(0.1), 2), FROZEN),
    "partition": (
        optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, ADAPTER),
        FROZEN | {"scale"},
    ),
    "partition by function": (
        optax.partition(
            {"train": optax.sgd(0.1), "keep": optax.set_to_zero()},
            lambda params: {key: "keep" if key == "scale" else "train" for key in params},
        ),
        FROZEN | {"scale"},
    ),
    "masked": (
        optax.chain(
            optax.masked(optax.adam(0.1), ADAPTER),
            optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, ADAPTER)),
        ),
        FROZEN | {"scale"},
    ),
    "masked floats": (optax.masked(optax.adam(0.1), FLOATS), FROZEN),
}


def mixed_loss(params, batch, key):
    down, up = params["adapter"]
    weight = params["values"] * params["scale"] + down @ up
    logits = jnp.where(params["switch"], batch["x"] @ weight, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"right": (logits.argmax(-1) == batch["y"]).sum()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED_OPTIMIZERS)
def test_integers_are_kept_and_floats_train(name):
    optimizer, kept = MIXED_OPTIMIZERS[name]
    state = fc.train.init_state(INT8, optimizer, jax.random.key(1))
    fitted, _ = run_fit(state, DATA, mixed_loss, optimizer, batch_size=30)
    chex.assert_trees_all_equal_shapes_and_dtypes(fitted, state)
    for key, leaves in INT8.items():
        same = bits(fitted.params[key]) == bits(leaves)
        assert same == (key in kept or leaves is None), key


@pytest.mark.slow
def test_integers_are_kept_in_epochs_parts_and_checkpoints(tmp_path):
    optimizer, kept = MIXED_OPTIMIZERS["partition"]
    state = fc.train.init_state(INT8, optimizer, jax.random.key(1))
    run = functools.partial(run_fit, state, DATA, mixed_loss, optimizer, accumulate=3)
    fitted, _ = run()
    run(epochs=1, checkpoint_dir=tmp_path)
    resumed, _ = run(checkpoint_dir=tmp_path)
    epoch = fc.train.make_epoch(mixed_loss, optimizer, batch_size=32, accumulate=3)
    for _ in range(2):
        state, _ = epoch(state, DATA)
    assert bits(state) == bits(resumed) == bits(fitted)
    assert all(bits(fitted.params[key]) == bits(INT8[key]) for key in kept)


def test_floats_train_as_they_do_without_integers():
    alone = {key: INT8[key] for key in ("scale", "adapter")}

    def loss(params, batch, key):
        return mixed_loss({**INT8, **params}, batch, key)[0]

    expected, _ = run_fit(
        fc.train.init_state(alone, OPTIMIZER, jax.random.key(1)), DATA, loss, OPTIMIZER
    )
    fitted, _ = run_fit(
        fc.train.init_state(INT8, OPTIMIZER, jax.random.key(1)), DATA, mixed_loss, OPTIMIZER
    )
    for key in alone:
        chex.assert_trees_all_close(fitted.params[key], expected.params[key], rtol=1e-5)


@pytest.mark.slow
def test_an_int8_layer_with_an_adapter_trains_the_adapter(tmp_path):
    layers = fc.quantize(fc.init_mlp(jax.random.key(0), [6, 8, 3]))
    params = fc.add_lora(jax.random.key(2), layers, rank=2, alpha=4)
    mask = fc.lora_mask(params)
    optimizer = optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, mask)
    state = fc.train.init_state(params, optimizer, jax.random.key(1))
    fitted, history = run_fit(
        state, DATA, loss_fn, optimizer, epochs=5, accumulate=2, checkpoint_dir=tmp_path
    )
    old, new = (jax.tree.leaves(tree) for tree in (params, fitted.params))
    for trains, before, after in zip(jax.tree.leaves(mask), old, new, strict=True):
        assert trains == (bits(before) != bits(after))
        assert before.dtype == after.dtype
    assert history.epochs["train_loss"][-1] < history.epochs["train_loss"][0]
    again, _ = run_fit(
        state, DATA, loss_fn, optimizer, epochs=5, accumulate=2, checkpoint_dir=tmp_path
    )
    assert bits(again) == bits(fitted)


def test_complex_leaves_train():
    def loss(params, batch, key):
        return jnp.abs(params["z"] - 3).sum()

    optimizer = optax.sgd(0.1)
    state = fc.train.init_state({"z": jnp.array([1 + 2j])}, optimizer, jax.random.key(1))
    state, _ = fc.train.make_step(loss, optimizer)(state, jnp.ones(2))
    gradient = jax.grad(lambda z: jnp.abs(z - 3).sum())(jnp.array([1 + 2j]))
    np.testing.assert_allclose(state.params["z"], 1 + 2j - 0.1 * gradient, rtol=1e-6)


def test_whole_numbers_are_metrics_too():
    def loss(params, batch, key):
        return params * 0, {"count": jnp.int32(7), "yes": jnp.array(True), "plain": 2}

    state = fc.train.init_state(jnp.zeros(()), OPTIMIZER, jax.random.key(1))
    for accumulate in (1, 2):
        _, history = run_fit(state, np.ones(8), loss, OPTIMIZER, accumulate=accumulate)
        for name, value in {"count": 7, "yes": 1, "plain": 2}.items():
            np.testing.assert_allclose(history.steps[name], value)
            np.testing.assert_allclose(history.epochs[f"train_{name}"], value)


def test_functions_of_three_arguments_are_taken_whatever_they_are():
    class Loss:
        def __call__(self, params, batch, key, scale=1.0):
            return params * scale

    losses = [Loss(), lambda *args: args[0], functools.partial(lambda s, p, b, k: s * p, 2.0)]
    for loss in (*losses, jax.jit(Loss())):
        state = fc.train.init_state(jnp.zeros(()), OPTIMIZER, jax.random.key(1))
        state, _ = fc.train.make_step(loss, OPTIMIZER)(state, jnp.ones(2))
        assert state.step == 1


def returning(value):
    """A call of each of the three functions with a loss function that returns this."""
    loss, data = lambda params, batch, key: value, np.ones(4, np.float32)
    calls = {
        "make_step": lambda: fc.train.make_step(loss, OPTIMIZER)(new_state(), data),
        "make_epoch": lambda: fc.train.make_epoch(loss, OPTIMIZER, batch_size=2)(new_state(), data),
        "fit": lambda: run_fit(new_state(), data, loss, OPTIMIZER),
    }
    return calls.items()


class LossError(ValueError):
    pass


def test_errors_inside_the_loss_function_come_through():
    def loss(params, batch, key):
        raise error

    for error in (LossError("no"), TypeError("missing 1 required positional argument")):
        for _, call in (
            ("make_step", lambda: fc.train.make_step(loss, OPTIMIZER)(new_state(), np.ones(4))),
            ("fit", lambda: run_fit(new_state(), np.ones(4), loss, OPTIMIZER)),
        ):
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error


STEP = fc.train.make_step(square_loss, OPTIMIZER)
EXPECTED = r"expected loss_fn\(params, batch, key\) -> loss or \(loss, metrics\)"
SCALAR = "with 'loss' a floating-point scalar, got"
RETURNED = {
    "a list": ([0.0, {}], TypeError, f" {SCALAR} list"),
    "nothing": (None, TypeError, f" {SCALAR} NoneType"),
    "three values": ((0.0, {}, {}), TypeError, ", got 3 values"),
    "one value": ((0.0,), TypeError, ", got 1 values"),
    "a string": ("0.5", TypeError, f" {SCALAR} '0.5' of type str"),
    "an integer": (3, TypeError, f" {SCALAR} 3 of type int"),
    "an integer array": (np.int32(3), TypeError, rf" {SCALAR} .* of shape \(\) and dtype int32"),
    "a complex number": (jnp.ones((), complex), TypeError, f" {SCALAR} .* dtype complex64"),
    "a vector": (np.ones(4), ValueError, rf" {SCALAR} an array of shape \(4,\)"),
    "metrics in a list": ((0.0, [1.0]), TypeError, " with a dict of metrics, got list"),
    "a scalar as metrics": ((0.0, 1.0), TypeError, r" with a dict of metrics, got 1\.0"),
    "a metric of every sample": (
        (0.0, {"right": np.ones(4)}),
        ValueError,
        r" with 'right' a real scalar, got an array of shape \(4,\)",
    ),
    "a complex metric": ((0.0, {"z": 1j}), TypeError, " with 'z' a real scalar, got 1j"),
    "a metric that is no number": (
        (0.0, {"n": {}}),
        TypeError,
        " with 'n' a real scalar, got dict",
    ),
}
BAD = {
    "key": (
        lambda: fc.train.init_state({}, OPTIMIZER, 0),
        TypeError,
        "init_state: expected one key from jax.random.key, got 0 of type int",
    ),
    "optimizer": (
        lambda: fc.train.make_step(loss_fn, optax.adam),
        TypeError,
        "make_step: expected optimizer to be an optax optimizer, got function",
    ),
    "loss function": (
        lambda: fc.train.make_epoch(1.0, OPTIMIZER, batch_size=3),
        TypeError,
        rf"^make_epoch: {EXPECTED}, got 1\.0 of type float$",
    ),
    "a loss function of one argument": (
        lambda: fc.train.make_epoch(lambda params: 0.0, OPTIMIZER, batch_size=3),
        TypeError,
        rf"^make_epoch: {EXPECTED}, got a function of \(params\)$",
    ),
    "a loss function of two arguments": (
        lambda: fc.train.make_step(lambda params, batch: 0.0, OPTIMIZER),
        TypeError,
        rf"^make_step: {EXPECTED}, got a function of \(params, batch\)$",
    ),
    "a loss function of four arguments": (
        lambda: run_fit(new_state(), DATA, lambda params, x, y, key: 0.0, OPTIMIZER),
        TypeError,
        rf"^fit: {EXPECTED}, got a function of \(params, x, y, key\)$",
    ),
    "a key by name only": (
        lambda: fc.train.make_step(lambda params, batch, *, key: 0.0, OPTIMIZER),
        TypeError,
        rf"^make_step: {EXPECTED}, got a function of \(params, batch, \*, key\)$",
    ),
    "accumulate": (
        lambda: fc.train.make_step(loss_fn, OPTIMIZER, accumulate=0),
        ValueError,
        "make_step: accumulate must be at least 1, got 0",
    ),
    "batch size": (
        lambda: fc.train.make_epoch(loss_fn, OPTIMIZER, batch_size=2.5),
        ValueError,
        r"make_epoch: batch_size must be an integer >= 0, got 2\.5",
    ),
    "loss of every sample": (
        lambda: fc.train.make_step(lambda params, x, key: x, OPTIMIZER)(new_state(), jnp.ones(4)),
        ValueError,
        rf"make_step: {EXPECTED} with 'loss' a floating-point scalar, got an array of shape \(4,\)",
    ),
    "different numbers of samples": (
        lambda: STEP(linear_state(OPTIMIZER), {**DATA, "y": DATA["y"][1:]}),
        ValueError,
        r"make_step: expected arrays with the same .* x has 90, y has 89",
    ),
    "a scalar": (
        lambda: STEP(linear_state(OPTIMIZER), {**DATA, "y": 1.0}),
        ValueError,
        r"make_step: expected arrays with the same number of samples .* y has None",
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

BAD |= {
    f"{function}, {name}": (call, error, f"^{function}: {EXPECTED}{message}")
    for name, (value, error, message) in RETURNED.items()
    for function, call in returning(value)
}

test_error = bad_calls(BAD)
