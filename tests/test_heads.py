"""Log-probabilities, soft labels, distillation and samples against the formulas on all logits."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import bad_calls
from forms import FORMS, weight_of
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc

KEY = jax.random.key(0)
LAYER = fc.init_linear(KEY, 24, 37)
OTHER = fc.init_linear(jax.random.key(4), 9, 37)
X = jax.random.normal(jax.random.key(1), (3, 5, 24))
OTHER_X = jax.random.normal(jax.random.key(5), (3, 5, 9))
LABELS = jax.random.randint(jax.random.key(2), (3, 5), 0, 37)


def scaled(logits, softcap=None, temperature=1.0):
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits / jnp.asarray(temperature)[..., None]


def plain_log_prob(params, x, labels, *, axis, where=None, **scale):
    log_p = jax.nn.log_softmax(scaled(fc.apply_linear(params, x, axis=axis), **scale))
    label = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return tuple(a if where is None else jnp.where(where, a, 0) for a in (label, entropy))


def plain_logsumexp(params, x, *, axis, **scale):
    return jax.nn.logsumexp(scaled(fc.apply_linear(params, x, axis=axis), **scale), -1)


def plain_cross_entropy(params, x, labels, *, axis, softcap, class_weights, where, reduction, **_):
    """As PyTorch documents it for labels that are probabilities, or classes and one hot."""
    smoothing = _["label_smoothing"]
    log_p = jax.nn.log_softmax(scaled(fc.apply_linear(params, x, axis=axis), softcap))
    classes = log_p.shape[-1]
    targets = labels if labels.ndim == log_p.ndim else jax.nn.one_hot(labels, classes)
    weights = jnp.ones(classes) if class_weights is None else class_weights
    counts = jnp.ones(log_p.shape[:-1]) if where is None else where
    smoothed = targets * (1 - smoothing) + smoothing / classes
    losses = -(weights * smoothed * log_p).sum(-1) * counts
    total = counts if labels.ndim == log_p.ndim else counts * (weights * targets).sum(-1)
    if reduction == "mean":
        return jnp.where(total.sum() == 0, 0, losses.sum() / jnp.where(total.sum(), total.sum(), 1))
    return losses if reduction == "none" else losses.sum()


def cross_entropy_of_function(params, x, probabilities, **arguments):
    def labels(classes):
        assert classes.dtype == jnp.int32
        return probabilities[..., classes]

    return fc.linear_cross_entropy(params, x, labels, **arguments)


def plain_distillation(student, teacher, x, x_teacher, *, axis, direction, where, **scale):
    p, q = (
        jax.nn.log_softmax(scaled(fc.apply_linear(layer, inputs, axis=axis), **scale))
        for layer, inputs in ((teacher, x_teacher), (student, x))
    )
    if direction == "reverse":
        p, q = q, p
    if direction == "jensen_shannon":
        m = jnp.logaddexp(p, q) - jnp.log(2.0)
        found = (jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m)).sum(-1) / 2
    else:
        found = (jnp.exp(p) * (p - q)).sum(-1)
    return found if where is None else found * where


@st.composite
def cases(draw):
    """One of the functions, the formula, and arguments of any kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    in_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    batch = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    classes = draw(st.integers(1, 30))
    axes = tuple(draw(st.permutations(range(len(batch) + len(in_shape))))[: len(in_shape)])

    def layer():
        bias = rng.standard_normal(classes) if draw(st.booleans()) else None
        form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
        weight = rng.standard_normal((*in_shape, classes))
        return lambda: jax.tree.map(jnp.asarray, form(fc.LinearParams(jnp.asarray(weight), bias)))

    def features():
        x = rng.standard_normal((*batch, *in_shape))
        return np.moveaxis(x, range(len(batch), x.ndim), axes)

    labels = rng.integers(0, classes, batch)
    softcap = draw(st.sampled_from([None, 1.5]))
    temperature = draw(st.sampled_from([1.0, 0.6, "each"]))
    if temperature == "each":
        temperature = rng.uniform(0.5, 2, batch)
    where = rng.choice([0.0, 0.5, 1.0], batch) if draw(st.booleans()) else None
    scale = {"softcap": softcap, "temperature": temperature}
    kind = draw(st.sampled_from(["log_prob", "logsumexp", "cross_entropy", "distillation"]))
    if kind == "log_prob":
        function, formula = fc.linear_log_prob, plain_log_prob
        args, more = (layer(), features(), labels), {"where": where, **scale}
    elif kind == "logsumexp":
        function, formula = fc.linear_logsumexp, plain_logsumexp
        args, more = (layer(), features()), scale
    elif kind == "distillation":
        function, formula = fc.linear_distillation, plain_distillation
        direction = draw(st.sampled_from(["forward", "reverse", "jensen_shannon"]))
        args = (layer(), layer(), features(), features())
        more = {"where": where, "direction": direction, **scale}
    else:
        function, formula = fc.linear_cross_entropy, plain_cross_entropy
        kind_of_labels = draw(st.sampled_from(["classes", "whole", "function"]))
        if kind_of_labels != "classes":
            labels = rng.dirichlet(np.ones(classes), batch)
        if kind_of_labels == "function":
            function = cross_entropy_of_function
        args = (layer(), features(), labels)
        more = {
            "softcap": softcap,
            "where": where,
            "class_weights": rng.uniform(0.1, 2, classes) if draw(st.booleans()) else None,
            "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
            "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        }
    sizes = {
        name: draw(st.none() | st.integers(1, 40)) for name in ("chunk_size", "row_chunk_size")
    }
    return function, formula, args, {"axis": axes, **more}, sizes


def derivatives(function, args):
    """Values, their tangents, and gradients and Hessian-vector products of a sum of cosines."""
    leaves, tree = jax.tree.flatten(args)
    moving = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def of_floats(floats):
        changed = list(leaves)
        for i, a in zip(moving, floats, strict=True):
            changed[i] = a
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, changed)))

    def scalar(floats):
        return sum(
            (jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a).sum() for a in of_floats(floats)
        )

    floats = [leaves[i] for i in moving]
    dots = [jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in floats]
    values, tangents = jax.jvp(of_floats, (floats,), (dots,))
    gradient, product = jax.jvp(jax.grad(scalar), (floats,), (dots,))
    return values, tangents, gradient, product


@given(case=cases())
def test_values_and_derivatives_are_those_of_the_formulas(case):
    function, formula, args, arguments, sizes = case
    with jax.enable_x64(True):
        args = tuple(a() if callable(a) else jnp.asarray(a) for a in args)
        ours, theirs = (
            jax.jit(partial(derivatives, partial(f, **arguments, **more)))(args)
            for f, more in ((function, sizes), (formula, {}))
        )
    # The scale of an int8 weight moves its logits by up to 127 times as much.
    largest = max([1.0, *(float(np.abs(a).max(initial=0)) for a in jax.tree.leaves(theirs))])
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * largest)


@pytest.mark.slow
@given(st.sampled_from(sorted(FORMS)), st.integers(1, 40), st.floats(0.3, 3), st.integers(0, 99))
def test_log_probs_are_numpys(form, chunk_size, temperature, seed):
    """In float64 to 1e-12, in float32 to 1e-5, from the weight written out by its definition."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((6, 20)), rng.standard_normal(20)
    x, labels = rng.standard_normal((7, 6)), rng.integers(0, 20, 7)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            layer = FORMS[form](fc.LinearParams(*(jnp.asarray(a, dtype) for a in (weight, bias))))
            found = fc.linear_log_prob(
                layer, jnp.asarray(x, dtype), labels, temperature=temperature, chunk_size=chunk_size
            )
            z = (x @ weight_of(layer.weight, 1) + np.asarray(layer.bias, np.float64)) / temperature
        log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= z.max(1, keepdims=True)
        entropy = -(np.exp(log_p) * log_p).sum(1)
        scale = 1 + np.abs(z).max()
        np.testing.assert_allclose(found.log_prob, log_p[range(7), labels], atol=tolerance * scale)
        np.testing.assert_allclose(found.entropy, entropy, atol=tolerance * scale)


@pytest.mark.slow
def test_every_order_and_mode_of_derivatives():
    def ours(x):
        return fc.linear_log_prob(LAYER, x, LABELS, chunk_size=10, row_chunk_size=4).entropy.sum()

    def plain(x):
        return plain_log_prob(LAYER, x, LABELS, axis=-1)[1].sum()

    def compositions(f):
        def along(f):
            return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]

        return along(along(f)), along(along(along(f))), jax.grad(along(f)), along(jax.grad(f))

    for a, b in zip(compositions(ours), compositions(plain), strict=True):
        np.testing.assert_allclose(jax.jit(a)(X), jax.jit(b)(X), rtol=1e-4, atol=1e-5)
    reverse = jax.grad(lambda x: jnp.sin(jax.grad(ours)(x)).sum())
    expected = jax.grad(lambda x: jnp.sin(jax.grad(plain)(x)).sum())
    np.testing.assert_allclose(jax.jit(reverse)(X), jax.jit(expected)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_samples_are_distributed_as_the_probabilities(top_k):
    """Pearson's chi-square over 10 classes; the quantile is that of 1 in a million."""
    layer = fc.init_linear(KEY, 6, 10)
    x, rows = jnp.ones((6,)), 20_000
    found = fc.linear_sample(
        KEY, layer, jnp.broadcast_to(x, (rows, 6)), temperature=0.4, top_k=top_k, chunk_size=4
    )
    log_p = np.asarray(jax.nn.log_softmax(fc.apply_linear(layer, x) / 0.4), np.float64)
    kept = np.argsort(-log_p)[:top_k]
    p = np.exp(log_p[kept]) / np.exp(log_p[kept]).sum()
    np.testing.assert_allclose(
        found.log_prob,
        np.log(p)[np.argsort(kept)[np.searchsorted(np.sort(kept), found.labels)]],
        rtol=1e-4,
        atol=1e-5,
    )
    counts = np.bincount(found.labels, minlength=10)
    assert counts.sum() == counts[kept].sum() == rows
    assert ((counts[kept] - rows * p) ** 2 / (rows * p)).sum() < 45


@pytest.mark.slow
def test_a_draw_depends_on_no_chunk():
    draws = [
        fc.linear_sample(KEY, LAYER, X, temperature=2.0, **sizes)
        for sizes in ({}, {"chunk_size": 5, "row_chunk_size": 4}, {"chunk_size": 1})
    ]
    for labels, log_prob in draws:
        np.testing.assert_array_equal(labels, draws[0].labels)
        np.testing.assert_allclose(log_prob, draws[0].log_prob, rtol=1e-5)
    expected = fc.linear_log_prob(LAYER, X, draws[0].labels, temperature=2.0).log_prob
    np.testing.assert_allclose(draws[0].log_prob, expected, rtol=1e-5)
    other = fc.linear_sample(jax.random.key(1), LAYER, X, temperature=2.0)
    assert (other.labels != draws[0].labels).any()
    raw = fc.linear_sample(jax.random.key_data(KEY), LAYER, X, temperature=2.0)
    np.testing.assert_array_equal(raw.labels, draws[0].labels)


@pytest.mark.slow
def test_log_probs_of_samples_and_largest_logits_are_differentiable():
    labels = fc.linear_sample(KEY, LAYER, X).labels

    def ours(params):
        return fc.linear_sample(KEY, params, X, chunk_size=10).log_prob.sum()

    def through(params):
        return fc.linear_log_prob(params, X, labels).log_prob.sum()

    def top(params):
        return jnp.sin(fc.linear_top_k(params, X, 5, chunk_size=10)[0]).sum()

    def plain_top(params):
        return jnp.sin(jax.lax.top_k(fc.apply_linear(params, X), 5)[0]).sum()

    for function, expected in ((ours, through), (top, plain_top)):
        actual = jax.tree.leaves(jax.grad(function)(LAYER))
        for a, b in zip(actual, jax.tree.leaves(jax.grad(expected)(LAYER)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_impossible_classes_do_not_matter():
    masked = LAYER._replace(bias=jnp.where(jnp.arange(37) % 3 == 1, -jnp.inf, LAYER.bias))
    kept = jnp.arange(37)[jnp.arange(37) % 3 != 1]
    few = fc.LinearParams(LAYER.weight[:, kept], LAYER.bias[kept])
    labels = LABELS % len(kept)
    soft = jax.nn.softmax(jax.random.normal(KEY, (3, 5, 37)))
    soft = jnp.where(jnp.arange(37) % 3 == 1, 0, soft)

    def losses(layer, labels, soft):
        found = fc.linear_log_prob(layer, X, labels, chunk_size=10)
        divergences = (
            fc.linear_distillation(
                layer,
                layer._replace(weight=-layer.weight),
                X,
                X,
                direction=direction,
                chunk_size=10,
            )
            for direction in ("forward", "reverse", "jensen_shannon")
        )
        return *found, fc.linear_cross_entropy(layer, X, soft, chunk_size=10), *divergences

    @jax.jit
    def total(layer, labels, soft):
        found = losses(layer, labels, soft)
        return sum((i + 1) * jnp.sin(a).sum() for i, a in enumerate(found)), found

    ((_, a), da), ((_, b), db) = (
        jax.value_and_grad(total, has_aux=True)(*args)
        for args in ((masked, kept[labels], soft), (few, labels, soft[..., kept]))
    )
    for ours, expected in zip(a, b, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(da.weight[:, kept], db.weight, rtol=1e-4, atol=1e-4)
    assert not np.asarray(da.weight)[:, 1::3].any()


@pytest.mark.slow
def test_rows_without_a_possible_class_are_nan_unless_they_are_ignored():
    nothing = LAYER._replace(bias=jnp.full(37, -jnp.inf))
    assert (fc.linear_logsumexp(nothing, X) == -jnp.inf).all()
    functions = (
        partial(fc.linear_cross_entropy, labels=LABELS),
        lambda params, x, **more: jnp.stack(fc.linear_log_prob(params, x, LABELS, **more)),
        lambda params, x, **more: fc.linear_distillation(params, OTHER, x, OTHER_X, **more),
    )
    for function in functions:
        assert np.isnan(function(nothing, X)).all()
        value, gradient = jax.value_and_grad(
            lambda x: function(nothing, x, where=jnp.zeros((3, 5), bool)).sum()  # noqa: B023
        )(X)
        assert value == 0
        assert not np.asarray(gradient).any()


def test_one_class_and_no_rows():
    one, empty = fc.init_linear(KEY, 24, 1), jnp.zeros((0, 24))
    found = fc.linear_log_prob(one, X, jnp.zeros((3, 5), int))
    np.testing.assert_array_equal(found, jnp.zeros((2, 3, 5)))
    assert not fc.linear_sample(KEY, one, X).labels.any()
    assert not np.asarray(fc.linear_distillation(one, one, X, X)).any()
    none = jnp.zeros(0, int)
    assert fc.linear_log_prob(LAYER, empty, none).entropy.shape == (0,)
    assert fc.linear_sample(KEY, LAYER, empty).labels.shape == (0,)
    assert fc.linear_logsumexp(LAYER, empty).shape == (0,)
    assert fc.linear_cross_entropy(LAYER, empty, none, reduction="mean") == 0
    assert not jax.grad(lambda p: fc.linear_log_prob(p, empty, none)[0].sum())(LAYER).weight.any()


@pytest.mark.parametrize("as_function", [False, True])
def test_ignored_probabilities_do_not_matter(as_function):
    where = jnp.arange(15).reshape(3, 5) % 4 != 1
    soft = jax.nn.softmax(jax.random.normal(KEY, (3, 5, 37)))

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, soft):
        labels = (lambda classes: soft[..., classes]) if as_function else soft
        return fc.linear_cross_entropy(params, x, labels, where=where, reduction="mean")

    worse = (jnp.where(where[..., None], a, jnp.nan) for a in (X, soft))
    chex.assert_trees_all_equal(loss(LAYER, *worse), loss(LAYER, X, soft))


def test_labels_of_a_teacher_are_never_whole():
    rows, classes = 1024, 2**16
    student = jax.eval_shape(lambda: fc.init_linear(KEY, 64, classes))
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)

    def loss(student, teacher, x, **sizes):
        log_sum = fc.linear_logsumexp(teacher, x)

        def labels(classes):
            logits = x @ teacher.weight[:, classes] + teacher.bias[classes]
            return jnp.exp(logits - log_sum[:, None])

        return fc.linear_cross_entropy(student, x, labels, reduction="sum", **sizes)

    for sizes in ({}, {"row_chunk_size": 10}):
        step = jax.jit(jax.grad(partial(loss, **sizes), (0, 1, 2)))
        memory = step.lower(student, student, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * rows * classes / 4


def test_infinite_logits():
    bias = jnp.zeros(37).at[3].set(jnp.inf)
    assert (fc.linear_logsumexp(LAYER._replace(bias=bias), X, chunk_size=10) == jnp.inf).all()
    far = LAYER._replace(weight=LAYER.weight * 1e4)
    found = fc.linear_log_prob(far, X, LABELS, chunk_size=10)
    for a, b in zip(found, plain_log_prob(far, X, LABELS, axis=-1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dtype_and_precision():
    def loss(params, x, **arguments):
        return fc.linear_cross_entropy(params, x, LABELS, reduction="mean", **arguments)

    half = jax.value_and_grad(partial(loss, dtype=jnp.bfloat16, chunk_size=10), (0, 1))
    value, gradients = half(LAYER, X)
    expected, expected_gradients = jax.value_and_grad(loss, (0, 1))(LAYER, X)
    assert value.dtype == gradients[1].dtype == gradients[0].weight.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=2e-3)
    text = jax.jit(partial(loss, precision="highest")).lower(LAYER, X).as_text()
    assert "HIGHEST" in text
    assert "HIGHEST" not in jax.jit(loss).lower(LAYER, X).as_text()


CALLS = {
    "loss": lambda layer, x: fc.linear_cross_entropy(layer, x, jnp.zeros(64, int), reduction="sum"),
    "log-probability": lambda layer, x: sum(
        map(jnp.sum, fc.linear_log_prob(layer, x, jnp.zeros(64, int)))
    ),
    "largest": lambda layer, x: fc.linear_top_k(layer, x, 3)[0].sum(),
    "sample": lambda layer, x: fc.linear_sample(KEY, layer, x).log_prob.sum(),
    "apply": lambda layer, x: fc.apply_linear(layer, x).sum(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_transposed_weight_is_read_in_place(name, backward):
    table = jax.ShapeDtypeStruct((5000, 1024), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)

    def call(table, x):
        return CALLS[name](fc.LinearParams(fc.Transposed(table), None), x)

    compiled = jax.jit(jax.grad(call, (0, 1)) if backward else call).lower(table, x).compile()
    assert "f32[1024,5000]" not in compiled.as_text()
    results = {"apply": 4 * 64 * 5000}.get(name, 0)
    assert compiled.memory_analysis().temp_size_in_bytes - results < 4 * 5000 * 1024


@pytest.mark.parametrize(
    ("rows", "inputs", "classes"),
    [
        (2**10, 64, 2**14),
        (2**16, 1024, 2**18),
        *(
            pytest.param(2**r, 64, 2**c, marks=pytest.mark.slow)
            for r, c in ((10, 18), (13, 16), (16, 14), (16, 18))
        ),
    ],
)
@pytest.mark.parametrize("function", [fc.linear_cross_entropy, fc.linear_log_prob])
def test_memory_is_bounded(function, rows, inputs, classes):
    """Three chunks of logits, of at most 2**24, one gradient of `x`, and what is smaller."""
    layer = jax.eval_shape(lambda: fc.init_linear(KEY, inputs, classes))
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def loss(params, x, labels):
        return sum(a.sum() for a in jax.tree.leaves(function(params, x, labels)))

    step = jax.jit(jax.grad(loss, (0, 1))).lower(layer, x, labels).compile()
    most = min(2**24, rows * max(inputs, 2**20 // rows))
    most = 3 * most + (rows + 2 * inputs) * inputs + 20 * rows + 2**18
    assert step.memory_analysis().temp_size_in_bytes <= 4 * most


LOG_PROB = partial(fc.linear_log_prob, LAYER, X, LABELS)
DISTILLATION = partial(fc.linear_distillation, LAYER)
BAD = {
    "temperature": (
        lambda: LOG_PROB(temperature=jnp.ones(4)),
        ValueError,
        r"linear_log_prob: temperature must be a number or have the shape \(3, 5\)",
    ),
    "softcap": (
        lambda: LOG_PROB(softcap=0.0),
        ValueError,
        r"linear_log_prob: softcap must be > 0, got 0\.0",
    ),
    "row chunk": (
        lambda: LOG_PROB(row_chunk_size=0),
        ValueError,
        "linear_log_prob: row_chunk_size must be at least 1, got 0",
    ),
    "float labels": (
        lambda: fc.linear_log_prob(LAYER, X, LABELS * 1.0),
        TypeError,
        "linear_log_prob: labels must be integers",
    ),
    "where": (
        lambda: LOG_PROB(where=jnp.ones(5)),
        ValueError,
        r"linear_log_prob: where must have the shape \(3, 5\)",
    ),
    "class weights": (
        lambda: fc.linear_cross_entropy(LAYER, X, LABELS, class_weights=jnp.ones(36)),
        ValueError,
        r"linear_cross_entropy: class_weights must have the shape \(37,\) .* \(36,\)",
    ),
    "function of another shape": (
        lambda: fc.linear_cross_entropy(LAYER, X, lambda classes: jnp.ones(len(classes))),
        ValueError,
        r"linear_cross_entropy: labels\(classes\) for 37 .* shape \(3, 5, 37\) .* shape \(37,\)",
    ),
    "function of integers": (
        lambda: fc.linear_cross_entropy(LAYER, X, lambda classes: classes),
        TypeError,
        r"linear_cross_entropy: labels\(classes\) must return probabilities, .* int32",
    ),
    "function of no array": (
        lambda: fc.linear_cross_entropy(LAYER, X, labels=lambda classes: None),
        TypeError,
        r"linear_cross_entropy: labels\(classes\) must return probabilities, .* NoneType",
    ),
    "key": (
        lambda: fc.linear_sample(jnp.ones(3), LAYER, X),
        TypeError,
        "linear_sample: expected one key from jax.random.key",
    ),
    "too many": (
        lambda: fc.linear_sample(KEY, LAYER, X, top_k=38),
        ValueError,
        "linear_sample: k must be from 1 to the 37 classes, got 38",
    ),
    "other classes": (
        lambda: DISTILLATION(fc.init_linear(KEY, 24, 36), X, X),
        ValueError,
        "linear_distillation: expected both layers to have the same classes, .* 37 .* 36",
    ),
    "other batch": (
        lambda: DISTILLATION(OTHER, X, OTHER_X[:2]),
        ValueError,
        r"linear_distillation: expected both inputs to have the same batch, .*\(3, 5\).*\(2, 5\)",
    ),
    "direction": (
        lambda: DISTILLATION(OTHER, X, OTHER_X, direction="backward"),
        ValueError,
        "linear_distillation: direction must be .* got 'backward'",
    ),
    "transposed": (
        lambda: fc.apply_linear(fc.LinearParams(fc.Transposed(jnp.ones((3, 4))), None), X),
        ValueError,
        r"apply_linear: x of shape \(3, 5, 24\) has features \(24,\)",
    ),
}
test_error = bad_calls(BAD)
