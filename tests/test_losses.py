"""linear_cross_entropy, linear_argmax and linear_top_k against the plain logits."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_calls import bad_calls
from cross_entropy_cases import CASES, fclayers_losses
from forms import FORMS
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import fclayers as fc

KEY = jax.random.key(0)


def plain(params, x, labels, *, axis=-1, label_smoothing=0.0, z_loss=0.0):
    """The loss of every position from all the logits, by optax."""
    logits = fc.apply_linear(params, x, axis=axis)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))
    return losses + z_loss * jax.nn.logsumexp(logits, -1) ** 2


@st.composite
def cases(draw):
    """A layer in any form, inputs with their features anywhere, labels, weights and arguments."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    in_shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    classes = draw(st.integers(1, 40))
    batch = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    form = draw(st.sampled_from(sorted(FORMS)))
    weight = rng.standard_normal((*in_shape, classes))
    bias = rng.standard_normal(classes) if draw(st.booleans()) else None
    axes = draw(st.permutations(range(len(batch) + len(in_shape))))[: len(in_shape)]
    x = rng.standard_normal((*batch, *in_shape))
    x = np.moveaxis(x, range(len(batch), x.ndim), axes)
    labels = rng.integers(0, classes, batch)
    where = rng.choice([0.0, 0.5, 1.0], batch) if draw(st.booleans()) else None
    arguments = {
        "axis": tuple(axes),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
    }
    chunk_size = draw(st.none() | st.integers(1, 50))
    return form, weight, bias, x, labels, where, arguments, chunk_size


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("float64", 1e-12)],
)
@given(case=cases())
def test_losses_and_gradients_are_the_plain_ones(case, dtype, tolerance):
    form, weight, bias, x, labels, where, arguments, chunk_size = case
    with jax.enable_x64(dtype == "float64"):
        bias = None if bias is None else jnp.asarray(bias, dtype)
        params = FORMS[form](fc.LinearParams(jnp.asarray(weight, dtype), bias))
        x, labels = jnp.asarray(x, dtype), jnp.asarray(labels)
        weights = 1 if where is None else where

        def ours(params, x):
            return fc.linear_cross_entropy(
                params, x, labels, where=where, chunk_size=chunk_size, **arguments
            )

        def theirs(params, x):
            return plain(params, x, labels, **arguments) * weights

        @partial(jax.jit, static_argnums=0)
        def losses_and_gradients(losses, params, x):
            y, pull = jax.vjp(losses, params, x)
            gradients = pull(jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape))
            floats = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
            return [y, *floats]

        actual, expected = (losses_and_gradients(loss, params, x) for loss in (ours, theirs))
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            # The gradient of an int8 weight's scale is a sum of numbers up to 127 times as large.
            scale = (1 + np.abs(b).max(initial=0.0)) * (127 if "int8" in form else 1)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


LAYER = fc.init_linear(KEY, 24, 37)
X = jax.random.normal(jax.random.key(1), (3, 5, 24))
LABELS = jax.random.randint(jax.random.key(2), (3, 5), 0, 37)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32_losses(dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (LAYER, X))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    loss = jax.value_and_grad(
        lambda params, x: fc.linear_cross_entropy(
            params, x, LABELS, chunk_size=10, reduction="mean"
        ),
        (0, 1),
    )
    ours, gradients = loss(params, x)
    expected, expected_gradients = loss(*wide)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(gradients, (params, x))
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a.astype(jnp.float32), gradients),
        expected_gradients,
        rtol=float(jnp.finfo(dtype).eps),
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_labels_of_any_width(dtype):
    """Of 300 classes, more than a byte can name."""
    layer, labels = fc.init_linear(KEY, 24, 300), np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(
        fc.linear_cross_entropy(layer, X, labels.astype(dtype), chunk_size=7),
        fc.linear_cross_entropy(layer, X, labels.astype(np.int32), chunk_size=7),
    )


def test_logits_of_ten_thousand_do_not_overflow():
    weight = jnp.array([[1e4, -1e4, 0.0, 9.9e3]])
    x, labels = jnp.array([[1.0], [-1.0], [1.0]]), jnp.array([0, 1, 1])
    value, gradients = jax.value_and_grad(
        lambda w: fc.linear_cross_entropy(
            fc.LinearParams(w, None), x, labels, chunk_size=1, reduction="sum"
        )
    )(weight)
    assert value == 2e4
    assert jnp.isfinite(gradients).all()


def test_classes_with_minus_infinity_as_their_bias_are_none():
    bias = jnp.where(jnp.arange(37) < 9, LAYER.bias, -jnp.inf)
    few = fc.LinearParams(LAYER.weight[:, :9], LAYER.bias[:9])
    labels = LABELS % 9
    for chunk_size in (5, 9, 37):
        np.testing.assert_allclose(
            fc.linear_cross_entropy(LAYER._replace(bias=bias), X, labels, chunk_size=chunk_size),
            fc.linear_cross_entropy(few, X, labels),
            rtol=1e-5,
        )


def test_labels_out_of_range_give_nan_unless_they_are_ignored():
    labels = LABELS.at[0, 0].set(37).at[1, 1].set(-1)
    losses = fc.linear_cross_entropy(LAYER, X, labels, chunk_size=10)
    np.testing.assert_array_equal(np.argwhere(np.isnan(losses)), [[0, 0], [1, 1]])

    def total(x, where):
        return fc.linear_cross_entropy(LAYER, x, labels, where=where, reduction="sum")

    bad = jnp.zeros((3, 5), bool).at[0, 0].set(True).at[1, 1].set(True)
    value, gradient = jax.value_and_grad(total)(X.at[0, 0].set(jnp.nan), ~bad)
    np.testing.assert_allclose(value, jnp.where(bad, 0, losses).sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.all(np.asarray(gradient) == 0, axis=-1), bad)
    assert np.isnan(jax.grad(total)(X, None)[0, 0]).all()


@pytest.mark.parametrize("where", [None, jnp.arange(15).reshape(3, 5) % 3 != 0])
def test_reductions(where):
    loss = partial(fc.linear_cross_entropy, LAYER, X, LABELS, where=where)
    weights = np.ones((3, 5)) if where is None else np.asarray(where)
    np.testing.assert_allclose(loss(reduction="sum"), loss().sum(), rtol=1e-6)
    mean = np.average(fc.linear_cross_entropy(LAYER, X, LABELS), weights=weights)
    np.testing.assert_allclose(loss(reduction="mean"), mean, rtol=1e-6)


def test_the_mean_over_nothing_is_nothing():
    loss = partial(fc.linear_cross_entropy, LAYER, labels=LABELS, reduction="mean")
    value, gradient = jax.value_and_grad(partial(loss, where=jnp.zeros((3, 5))))(X)
    assert value == 0
    assert not gradient.any()


@pytest.mark.slow
def test_vmap_over_inputs_and_over_layers():
    ours = partial(fc.linear_cross_entropy, chunk_size=10)
    np.testing.assert_allclose(
        jax.vmap(ours, (None, 0, 0))(LAYER, X, LABELS), ours(LAYER, X, LABELS), rtol=1e-5
    )
    layers = jax.vmap(lambda key: fc.init_linear(key, 24, 37))(jax.random.split(KEY, 3))
    gradients = jax.vmap(jax.grad(partial(ours, reduction="sum")))(layers, X, LABELS)
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], layers)
        one = jax.grad(partial(ours, reduction="sum"))(layer, X[i], LABELS[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], gradients), one, rtol=1e-5, atol=1e-6
        )


def temporaries(classes, rows=256):
    params = fc.LinearParams(
        jax.ShapeDtypeStruct((64, classes), jnp.float32),
        jax.ShapeDtypeStruct((classes,), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    step = jax.value_and_grad(partial(fc.linear_cross_entropy, reduction="mean"), (0, 1))
    return jax.jit(step).lower(params, x, labels).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_classes():
    small, large = temporaries(2**15), temporaries(2**18)
    assert large <= small + 2**10
    assert large < 0.1 * 4 * 256 * 2**18


@given(
    st.sampled_from(sorted(FORMS)), st.integers(1, 40), st.none() | st.integers(1, 50), st.data()
)
def test_predictions(form, classes, chunk_size, data):
    params = FORMS[form](fc.init_linear(jax.random.key(classes), 6, classes))
    x = jax.random.normal(jax.random.key(data.draw(st.integers(0, 99))), (4, 6, 2))
    k = data.draw(st.integers(1, classes))
    logits = fc.apply_linear(params, x, axis=1)
    values, found = fc.linear_top_k(params, x, k, axis=1, chunk_size=chunk_size)
    expected, _ = lax.top_k(logits, k)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jnp.take_along_axis(logits, found, -1), expected, rtol=1e-5, atol=1e-5
    )
    best = fc.linear_argmax(params, x, axis=1, chunk_size=chunk_size)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(best, found[..., 0])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 10])
def test_predictions_with_ties_infinities_and_nan(chunk_size):
    nan, inf = np.nan, np.inf
    rows = [
        [1.0, 3, 3, 2, 3, 0],
        [-inf] * 6,
        [0, -inf, 5, -inf, 5, inf],
        [0, 1, nan, 2, nan, inf],
    ]
    layer = fc.LinearParams(jnp.zeros((1, 6)), None)
    for row in rows:
        params = layer._replace(bias=jnp.array(row))
        _, found = fc.linear_top_k(params, jnp.ones((1, 1)), 4, chunk_size=chunk_size)
        np.testing.assert_array_equal(found, lax.top_k(jnp.array([row]), 4)[1])
        best = fc.linear_argmax(params, jnp.ones((1, 1)), chunk_size=chunk_size)
        np.testing.assert_array_equal(best, [jnp.argmax(jnp.array(row))])


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_predicts_what_it_trains(form):
    params = FORMS[form](LAYER)
    losses = fc.linear_cross_entropy(params, X, LABELS)
    logits = fc.apply_linear(params, X)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


GOLDEN = np.load(Path(__file__).parent / "golden" / "cross_entropy.npz")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cross_entropy_is_torchs(case):
    for name, array in fclayers_losses(case).items():
        expected = GOLDEN[f"{case.name}/{name}"]
        np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-12 * case.scale)


LOSS = partial(fc.linear_cross_entropy, LAYER, X, LABELS)
BAD = {
    "float labels": (
        lambda: fc.linear_cross_entropy(LAYER, X, LABELS * 1.0),
        TypeError,
        r"linear_cross_entropy: labels must be integers, got an array .* float32",
    ),
    "labels of another shape": (
        lambda: fc.linear_cross_entropy(LAYER, X, LABELS[:, :4]),
        ValueError,
        r"linear_cross_entropy: labels must have the shape \(3, 5\) of the batch, .* \(3, 4\)",
    ),
    "weights of another shape": (
        lambda: LOSS(where=jnp.ones(5)),
        ValueError,
        r"linear_cross_entropy: where must have the shape \(3, 5\) of the batch, .* \(5,\)",
    ),
    "chunk of zero": (
        lambda: LOSS(chunk_size=0),
        ValueError,
        "linear_cross_entropy: chunk_size must be at least 1, got 0",
    ),
    "fractional chunk": (
        lambda: LOSS(chunk_size=1.5),
        ValueError,
        r"linear_cross_entropy: chunk_size must be an integer >= 0, got 1\.5",
    ),
    "smoothing": (
        lambda: LOSS(label_smoothing=1.5),
        ValueError,
        r"linear_cross_entropy: label_smoothing must be in \[0, 1\], got 1\.5",
    ),
    "z-loss": (
        lambda: LOSS(z_loss=-1.0),
        ValueError,
        r"linear_cross_entropy: z_loss must be >= 0, got -1\.0",
    ),
    "reduction": (
        lambda: LOSS(reduction="avg"),
        ValueError,
        "linear_cross_entropy: reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    "features": (
        lambda: fc.linear_cross_entropy(LAYER, X[..., 1:], LABELS),
        ValueError,
        r"linear_cross_entropy: x of shape \(3, 5, 23\) has features \(23,\)",
    ),
    "several output axes": (
        lambda: fc.linear_cross_entropy(fc.init_linear(KEY, 24, (3, 4)), X, LABELS),
        ValueError,
        r"linear_cross_entropy: expected a layer with one output axis, .* \(3, 4\)",
    ),
    "no layer": (
        lambda: fc.linear_argmax({}, X),
        TypeError,
        "linear_argmax: expected params to be LinearParams, got dict",
    ),
    "too many": (
        lambda: fc.linear_top_k(LAYER, X, 38),
        ValueError,
        "linear_top_k: k must be from 1 to the 37 classes, got 38",
    ),
}


test_error = bad_calls(BAD)
