"""Gradients of every example against `vmap(grad)`, and what must not be taken."""

import os
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_calls import bad_calls
from forms import FORMS
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from per_example_networks import draw_network

import fclayers as fc
from fclayers.per_example import chunks

NUM_NETWORKS = int(os.environ.get("PER_EXAMPLE_NETWORKS", "1"))
CHUNK = 10


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def is_inexact(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def flat_jacobians(fun, params, batch):
    """Results `(N, *out)`, Jacobians `(N, *out, parameters)`, and the parts for every leaf."""
    leaves, structure = jax.tree.flatten(params)
    trained = [leaf for leaf in leaves if is_inexact(leaf)]

    def run(trained, example):
        rest = iter(trained)
        merged = [next(rest) if is_inexact(leaf) else leaf for leaf in leaves]
        out = fun(jax.tree.unflatten(structure, merged), example)
        return out, out

    found, outs = jax.jit(jax.vmap(jax.jacrev(run, has_aux=True), (None, 0)))(trained, batch)
    parts = [np.asarray(part).reshape(*outs.shape, -1) for part in found]
    return np.asarray(outs), np.concatenate(parts, -1), parts


def close(actual, expected):
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, rtol=0, atol=1e-12)


def check(fun, params, batch, other):
    """Everything about a function that returns a vector, for the sum of its squares as a loss."""

    def loss(params, example):
        return (fun(params, example) ** 2).sum()

    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), batch, other)
    outs, jacobians, parts = flat_jacobians(fun, params, both)
    count = len(jax.tree.leaves(batch)[0])
    gradients = 2 * np.einsum("no,nop->np", outs, jacobians)
    parts = [2 * np.einsum("no,nop->np", outs[:count], part[:count]) for part in parts]
    norms = np.linalg.norm(gradients[:count], axis=-1)
    limit = float(np.median(norms)) + 1e-3

    @jax.jit
    def ours(params, batch, other, limit):
        return (
            fc.per_example_norms(loss)(params, batch),
            fc.per_example_norms(loss, per_leaf=True)(params, batch),
            fc.clipped_grad(loss, limit)(params, batch),
            fc.gradient_gram(loss)(params, batch, other),
            fc.empirical_ntk(fun)(params, batch, other),
        )

    found, each, (losses, clipped), gram, kernel = ours(params, batch, other, limit)
    close(found, norms)
    close(losses, (outs[:count] ** 2).sum(-1))
    close(gram, gradients[:count] @ gradients[count:].T)
    close(kernel, np.einsum("nop,mqp->nmoq", jacobians[:count], jacobians[count:]))
    assert jax.tree.structure(each) == jax.tree.structure(clipped) == jax.tree.structure(params)
    weights, rest = 1 / np.maximum(norms / limit, 1), iter(parts)
    for leaf, norm, total in zip(*map(jax.tree.leaves, (params, each, clipped)), strict=True):
        part = next(rest) if is_inexact(leaf) else np.zeros((count, leaf.size))
        close(norm, np.linalg.norm(part, axis=-1))
        assert (total.shape, total.dtype) == (leaf.shape, leaf.dtype)
        close(total.reshape(-1), weights @ part)


@pytest.mark.parametrize("first", range(0, NUM_NETWORKS, CHUNK))
def test_random_networks(first):
    """`PER_EXAMPLE_NETWORKS=1000 python -m pytest tests/test_per_example.py -k random`."""
    for seed in range(first, min(first + CHUNK, NUM_NETWORKS)):
        network = draw_network(seed)
        try:
            check(network.fun, network.params, network.batch, network.other)
        except Exception as error:
            error.add_note(f"network {seed}: {network.names}")
            raise


def squares(params, example):
    """A loss of one fully connected layer."""
    x, y = example
    return jnp.sum((fc.apply_linear(params, x) - y) ** 2)


def layer_and_batch(count=6, *, seed=0):
    layer = fc.init_linear(jax.random.key(0), 3, 2, dtype=jnp.float64)
    rng = np.random.default_rng(seed)
    return layer, (
        jnp.asarray(rng.normal(size=(count, 3))),
        jnp.asarray(rng.normal(size=(count, 2))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_weight(name):
    layer = FORMS[name](fc.init_linear(jax.random.key(0), 6, 4, dtype=jnp.float64))
    x = jax.random.normal(jax.random.key(1), (3, 2, 6), jnp.float64)

    def loss(layer, x):
        return jnp.sin(fc.apply_linear(layer, x)).sum()

    _, gradients, _ = flat_jacobians(loss, layer, x)
    close(jax.jit(fc.per_example_norms(loss))(layer, x), np.linalg.norm(gradients, axis=-1))


def test_head_without_logits():
    head = fc.init_linear(jax.random.key(0), 4, 50, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (5, 4), jnp.float64)

    def loss(head, example):
        return fc.linear_cross_entropy(head, *example, chunk_size=20)

    def plain(head, example):
        x, label = example
        logits = fc.apply_linear(head, x)
        return jax.nn.logsumexp(logits) - logits[label]

    @partial(jax.jit, static_argnums=0)
    def both(loss, head, batch):
        return fc.per_example_norms(loss)(head, batch), fc.clipped_grad(loss, 1.0)(head, batch)

    batch = x, jnp.arange(5) * 10
    chex.assert_trees_all_close(
        both(loss, head, batch), both(plain, head, batch), rtol=1e-10, atol=1e-12
    )


def test_large_parameters_fall_back_alone(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**12)
    table = jax.random.normal(jax.random.key(0), (600, 3), jnp.float64)
    layer = fc.init_linear(jax.random.key(1), 3, 3, dtype=jnp.float64)

    def fun(params, x):
        table, layer = params
        start = (jnp.abs(x[0]) * 100).astype(jnp.int32)
        rows = lax.dynamic_slice_in_dim(table, start, 4, 0)
        return jnp.tanh(fc.apply_linear(layer, x) + rows.sum(0) + table.mean(0))

    batch = jax.random.normal(jax.random.key(2), (5, 3), jnp.float64)
    check(fun, (table, layer), batch, batch[:3])
    report = fc.explain_per_example(lambda p, x: fun(p, x).sum())((table, layer), batch)
    assert [row.kind for row in report.rows] == ["fallback", "outer product", "formed"]
    assert report.falls_back
    assert "dynamic_slice" in report.rows[0].reason
    assert all(line.startswith("test_per_example.py") for row in report.rows for line in row.lines)
    assert "fallback" in repr(report)


def test_convolutions_in_chunks(monkeypatch):
    """Of two examples, with a rest, on CPUs; their norms are differentiated as well."""
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 1, 2), jnp.float64)
    batch = jax.random.normal(jax.random.key(1), (5, 6, 6, 1), jnp.float64)
    monkeypatch.setattr(chunks, "CACHED_BYTES", 2 * 8 * (8 + 25 * (4 + 2)))

    def fun(kernel, x):
        y = lax.conv(jnp.moveaxis(x, -1, 0)[None], kernel.T, (1, 1), "VALID")
        return jnp.sin(y).sum((0, 2, 3))

    check(fun, kernel, batch, batch[:2])

    def ours(kernel):
        return fc.per_example_norms(lambda p, x: fun(p, x).sum())(kernel, batch).sum()

    def formed(kernel):
        gradients = jax.vmap(jax.grad(lambda p, x: fun(p, x).sum()), (None, 0))(kernel, batch)
        return jax.vmap(optax.tree.norm)(gradients).sum()

    found, expected = jax.jit(lambda p: (jax.grad(ours)(p), jax.grad(formed)(p)))(kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert "scan" in str(jax.make_jaxpr(ours)(kernel))


@pytest.mark.slow
def test_long_sequences_in_chunks(monkeypatch):
    """Everything example by example, or a few at a time, with a rest."""
    for size in (1, 2**11):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
        network = draw_network(3)
        check(network.fun, network.params, network.batch, network.other)
        layer, batch = layer_and_batch(7)
        check(lambda p, e: fc.apply_linear(p, e[0]) - e[1], layer, batch, batch)


def test_clipped_sums_are_those_of_optax():
    layer, batch = layer_and_batch()

    @jax.jit
    def expected(layer, batch):
        gradients = jax.vmap(jax.grad(squares), (None, 0))(layer, batch)
        private = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)
        return private.update(gradients, private.init(layer))[0]

    _, clipped = jax.jit(fc.clipped_grad(squares, 1.0, reduction="mean"))(layer, batch)
    chex.assert_trees_all_close(clipped, expected(layer, batch), rtol=1e-12)


def test_no_limit_gives_the_gradient():
    layer, batch = layer_and_batch()
    _, summed = jax.jit(fc.clipped_grad(squares, jnp.inf))(layer, batch)
    gradient = jax.grad(lambda p: jax.vmap(squares, (None, 0))(p, batch).sum())(layer)
    chex.assert_trees_all_close(summed, gradient, rtol=1e-12)


def test_noise_has_the_deviation_that_was_asked_for():
    layer = fc.init_linear(jax.random.key(0), 300, 200, dtype=jnp.float64)
    batch = jnp.ones((2, 300)), jnp.ones((2, 200))

    @jax.jit
    def noises(key):
        """Of the sum and of the mean."""
        found = []
        for reduction in ("sum", "mean"):
            clipped = partial(fc.clipped_grad, squares, 2.0, reduction=reduction)
            _, noisy = clipped(noise_multiplier=1.5, key=key)(layer, batch)
            _, without = clipped()(layer, batch)
            found.append(jax.tree.map(jnp.subtract, noisy, without))
        return found

    one, other = (jax.device_get(noises(jax.random.key(seed))) for seed in (1, 2))
    for noise, another, deviation in zip(one, other, (3.0, 1.5), strict=True):
        np.testing.assert_allclose(noise.weight.std(), deviation, rtol=0.02)
        np.testing.assert_allclose(noise.weight.mean(), 0, atol=0.1)
        assert not np.allclose(noise.weight, another.weight)
        assert not np.allclose(noise.bias, noise.weight[0])


def test_norms_are_differentiable():
    layer, batch = layer_and_batch()

    def ours(layer):
        return fc.per_example_norms(squares)(layer, batch).sum()

    def by_hand(layer):
        gradients = jax.vmap(jax.grad(squares), (None, 0))(layer, batch)
        return sum(jnp.sqrt((w**2).sum() + (b**2).sum()) for w, b in zip(*gradients, strict=True))

    found, expected = jax.jit(lambda p: (jax.grad(ours)(p), jax.grad(by_hand)(p)))(layer)
    chex.assert_trees_all_close(found, expected, rtol=1e-10)


def test_sums_accumulate_over_microbatches():
    layer, batch = layer_and_batch(6)
    clipped = jax.jit(fc.clipped_grad(squares, 1.0))

    def add(total, part):
        return jax.tree.map(jnp.add, total, clipped(layer, part)[1]), None

    parts = jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), batch)
    total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, layer), parts)
    chex.assert_trees_all_close(total, clipped(layer, batch)[1], rtol=1e-12)


def test_random_keys_are_examples():
    layer, (x, y) = layer_and_batch()

    def loss(layer, example):
        key, x, y = example
        return squares(layer, (x * jax.random.bernoulli(key, 0.5, x.shape), y))

    keys = jax.random.split(jax.random.key(0), len(x))
    _, gradients, _ = flat_jacobians(loss, layer, (keys, x, y))
    norms = jax.jit(fc.per_example_norms(loss))(layer, (keys, x, y))
    np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=-1), rtol=1e-12)


def test_half_precision_keeps_its_dtype():
    layer = fc.init_linear(jax.random.key(0), 30, 20, dtype=jnp.bfloat16)
    batch = jnp.ones((4, 5, 30), jnp.bfloat16), jnp.ones((4, 5, 20), jnp.bfloat16)

    def loss(layer, example):
        return squares(layer, example).astype(jnp.float32)

    losses, grads = jax.jit(fc.clipped_grad(loss, 1.0))(layer, batch)
    assert losses.dtype == jnp.float32
    assert {leaf.dtype for leaf in grads} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (layer, batch))
    expected = jax.jit(fc.per_example_norms(squares))(*wide)
    norms = jax.jit(fc.per_example_norms(loss))(layer, batch)
    np.testing.assert_allclose(norms, expected, rtol=0.03)


def test_kronecker_factors_of_one_example_are_its_gradient():
    layer, batch = layer_and_batch(1)
    factors = jax.jit(fc.kronecker_factors(squares))(layer, batch)
    gradient = jax.grad(squares)(layer, jax.tree.map(lambda a: a[0], batch)).weight.reshape(-1)
    np.testing.assert_allclose(
        np.kron(*factors.weight), np.outer(gradient, gradient), rtol=1e-10, atol=1e-12
    )
    assert factors.bias is None


def test_kronecker_factors_of_layers_positions_and_groups():
    """By their definition, from the inputs and the gradients with respect to added zeros."""
    rng = np.random.default_rng(0)
    stack, x = jnp.asarray(rng.normal(size=(2, 3, 3))), jnp.asarray(rng.normal(size=(5, 4, 3)))

    def inputs_and_loss(stack, x, taps):
        inputs = []
        for weight, tap in zip(stack, taps, strict=True):
            inputs.append(x)
            x = jnp.sin(x @ weight + tap)
        return (x**2).sum(), jnp.stack(inputs)

    def loss(stack, x):
        x, _ = lax.scan(lambda x, weight: (jnp.sin(x @ weight), None), x, stack)
        return (x**2).sum()

    taps = jnp.zeros((2, 4, 3))

    @jax.jit
    @jax.vmap
    def gradients_and_inputs(x):
        return jax.grad(lambda taps: inputs_and_loss(stack, x, taps), has_aux=True)(taps)

    gradients, inputs = gradients_and_inputs(x)
    factors = jax.jit(fc.kronecker_factors(loss))(stack, x)
    np.testing.assert_allclose(
        factors.inputs, np.einsum("nlpi,nlpj->lij", inputs, inputs) / 5, rtol=1e-10
    )
    np.testing.assert_allclose(
        factors.gradients, np.einsum("nlpi,nlpj->lij", gradients, gradients) / 20, rtol=1e-10
    )
    conv = fc.init_conv(jax.random.key(0), (3, 3), 4, 6, groups=2, dtype=jnp.float64)
    image = jnp.asarray(rng.normal(size=(2, 5, 5, 4)))

    def conv_loss(conv, x):
        return (fc.apply_conv(conv, x, groups=2) ** 2).sum()

    found = jax.jit(fc.kronecker_factors(conv_loss))(conv, image).weight
    assert found.inputs.shape == (2, 18, 18)
    assert found.gradients.shape == (2, 3, 3)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches(kind):
    layer, batch = layer_and_batch(8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    by_example, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))
    sharded = jax.device_put(batch, by_example)
    params = jax.device_put(layer, everywhere)
    with jax.set_mesh(mesh):
        for make in (
            fc.per_example_norms,
            partial(fc.clipped_grad, max_norm=1.0),
            fc.gradient_gram,
            fc.kronecker_factors,
        ):
            results = jax.tree.leaves(jax.jit(make(squares))(params, sharded))
            expected = jax.tree.leaves(make(squares)(layer, batch))
            for got, want in zip(results, expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
            assert jax.tree.leaves(results)[0].sharding is not None


def printing(params, example):
    jax.debug.print("{}", example[0].sum())
    return squares(params, example)


SMALL = fc.LinearParams(jnp.ones((3, 2), jnp.float32), jnp.ones(2, jnp.float32))
BATCH = jnp.ones((4, 3), jnp.float32), jnp.ones((4, 2), jnp.float32)
KEY = jax.random.key(0)
BAD = {
    "a vector": (
        lambda: fc.per_example_norms(lambda p, e: e[0])(SMALL, BATCH),
        ValueError,
        r"per_example_norms: expected a loss of one example, a scalar; .* shape \(3,\)",
    ),
    "two results": (
        lambda: fc.clipped_grad(lambda p, e: (1.0, 2.0), 1.0)(SMALL, BATCH),
        TypeError,
        "clipped_grad: expected a function that returns a scalar, got tuple",
    ),
    "an integer": (
        lambda: fc.gradient_gram(lambda p, e: jnp.int32(1))(SMALL, BATCH),
        TypeError,
        "gradient_gram: expected a function that returns real numbers, got .* int32",
    ),
    "a tree": (
        lambda: fc.empirical_ntk(lambda p, e: {"y": e[0]})(SMALL, BATCH),
        TypeError,
        "empirical_ntk: expected a function that returns one array, got dict",
    ),
    "no function": (
        lambda: fc.per_example_norms(3)(SMALL, BATCH),
        TypeError,
        "per_example_norms: expected a function of params and one example, got 3 of type int",
    ),
    "different lengths": (
        lambda: fc.per_example_norms(squares)(SMALL, (BATCH[0], BATCH[1][:3])),
        ValueError,
        "per_example_norms: expected a batch .* 0 has 4, 1 has 3",
    ),
    "no axis": (
        lambda: fc.per_example_norms(squares)(SMALL, jnp.ones(())),
        ValueError,
        "per_example_norms: expected a batch .* it has None",
    ),
    "no arrays": (
        lambda: fc.per_example_norms(squares)(SMALL, ()),
        ValueError,
        "per_example_norms: expected a batch .* there are no arrays",
    ),
    "no examples": (
        lambda: fc.explain_per_example(squares)(SMALL, (BATCH[0][:0], BATCH[1][:0])),
        ValueError,
        "explain_per_example: .*expected at least one example, got none",
    ),
    "side effects": (
        lambda: fc.kronecker_factors(printing)(SMALL, BATCH),
        ValueError,
        "kronecker_factors: the function has side effects",
    ),
    "no arrays in params": (
        lambda: fc.per_example_norms(squares)({"activation": jnp.tanh}, BATCH),
        TypeError,
        "per_example_norms: expected params of arrays, got .* at 'activation'",
    ),
    "a negative norm": (
        lambda: fc.clipped_grad(squares, -1.0),
        ValueError,
        r"clipped_grad: max_norm must be positive, got -1\.0",
    ),
    "several norms": (
        lambda: fc.clipped_grad(squares, jnp.ones(2, jnp.float32)),
        TypeError,
        "clipped_grad: expected max_norm to be a number",
    ),
    "a reduction": (
        lambda: fc.clipped_grad(squares, 1.0, reduction="none"),
        ValueError,
        "clipped_grad: reduction must be 'sum' or 'mean', got 'none'",
    ),
    "negative noise": (
        lambda: fc.clipped_grad(squares, 1.0, noise_multiplier=-1.0),
        ValueError,
        "clipped_grad: noise_multiplier must be a number >= 0",
    ),
    "noise without a key": (
        lambda: fc.clipped_grad(squares, 1.0, noise_multiplier=1.0),
        ValueError,
        "clipped_grad: expected a key with noise and none without, got NoneType",
    ),
    "a key without noise": (
        lambda: fc.clipped_grad(squares, 1.0, key=KEY),
        ValueError,
        "clipped_grad: expected a key with noise and none without",
    ),
    "not a key": (
        lambda: fc.clipped_grad(squares, 1.0, noise_multiplier=1.0, key=3),
        TypeError,
        "clipped_grad: expected one key from jax.random.key",
    ),
    "infinite noise": (
        lambda: fc.clipped_grad(squares, jnp.inf, noise_multiplier=1.0),
        ValueError,
        "clipped_grad: noise needs a finite max_norm",
    ),
}
test_error = bad_calls(BAD)
