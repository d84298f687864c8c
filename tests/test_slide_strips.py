"""slide in strips of positions, where all at once would need much memory, or any cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax import lax
from padded_networks import padded_cases
from slide_networks import cases
from test_slide import assert_equation_holds
from test_slide_padded import assert_equation_holds as assert_equation_of_padded_holds
from test_slide_padded import assert_gradients_agree

import fclayers as fc
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.sliding import costs, strips

CONVS = [fc.init_conv(jax.random.key(i), (3, 3), *size) for i, size in enumerate([(2, 4), (4, 6)])]
WINDOW, IMAGE = (9, 8), jax.random.normal(jax.random.key(2), (44, 40, 2))
# A fixture is for a whole test, of which hypothesis runs many examples.
SETTINGS = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def network(convs, x):
    x = fc.max_pool(jax.nn.relu(fc.apply_conv(convs[0], x)), (2, 2))
    return jnp.tanh(fc.apply_conv(convs[1], x)).sum((0, 1)), x[0, 0]


def padded(convs, x):
    y = jax.nn.relu(fc.apply_conv(convs[0], x, padding="SAME"))
    return fc.max_pool(fc.apply_conv(convs[1], y, padding="SAME"), (2, 2)).sum((0, 1))


def take_strips(monkeypatch, strip_bytes):
    """Strips of this size, whatever they compute twice."""
    monkeypatch.setattr(strips, "CROSSOVERS", CROSSOVERS._replace(strip_bytes=strip_bytes))
    monkeypatch.setattr(strips, "_MOST_WORK", 100)
    monkeypatch.setattr(strips, "_MOST_PIXELS", 100)


@pytest.fixture
def _small_caches(monkeypatch):
    take_strips(monkeypatch, 2**9)


@pytest.mark.usefixtures("_small_caches")
@SETTINGS
@given(cases(layers=(1, 4)))
def test_equation(case):
    assert_equation_holds(case, "float64", 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_caches")
@SETTINGS
@given(padded_cases(layers=(1, 4)))
def test_equation_of_networks_that_pad(case):
    assert_equation_of_padded_holds(case)
    assert_gradients_agree(case)


@pytest.mark.parametrize(("limit", "stride"), [(2**12, 1), (2**15, (3, 2)), (2**18, 1)])
def test_strips_that_fit_the_cache_give_the_same(monkeypatch, limit, stride):
    sliding = fc.slide(network, WINDOW, stride=stride)
    expected = jax.jit(sliding)(CONVS, IMAGE)
    assert "scan" not in str(jax.make_jaxpr(sliding)(CONVS, IMAGE))
    take_strips(monkeypatch, limit)
    for run in (sliding, jax.jit(sliding)):
        for ours, theirs in zip(run(CONVS, IMAGE), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_small_caches")
def test_only_what_is_evaluated_runs_in_strips():
    sliding = fc.slide(network, WINDOW)
    assert "scan" in str(jax.make_jaxpr(sliding)(CONVS, IMAGE))

    def loss(convs, x):
        return sum((out**2).sum() for out in sliding(convs, x))

    assert "scan" not in str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(CONVS, IMAGE))


def test_strips_that_compute_much_twice_are_not_taken(monkeypatch):
    monkeypatch.setattr(strips, "CROSSOVERS", CROSSOVERS._replace(strip_bytes=2**9))
    monkeypatch.setattr(strips, "_MOST_PIXELS", 100)
    assert "scan" not in str(jax.make_jaxpr(fc.slide(network, WINDOW))(CONVS, IMAGE))


@pytest.mark.slow
def test_transformations_of_strips(monkeypatch):
    sliding = fc.slide(padded, WINDOW, stride=2)
    images = jnp.stack([IMAGE, -IMAGE])
    directions = jax.tree.map(jnp.sin, (CONVS, IMAGE))

    def results():
        def loss(convs, x):
            return (sliding(convs, x) ** 2).mean()

        jax.clear_caches()
        return (
            jax.jit(jax.vmap(sliding, (None, 0)))(CONVS, images),
            jax.jit(jax.grad(loss, (0, 1)))(CONVS, IMAGE),
            jax.jit(partial(jax.jvp, sliding))((CONVS, IMAGE), directions),
            jax.jit(partial(jax.jvp, partial(sliding, CONVS)))((IMAGE,), (directions[1],)),
            jax.jit(fc.slide(lambda x: sliding(CONVS, x).sum((0, 1)), (15, 15), stride=8))(IMAGE),
        )

    expected = results()
    take_strips(monkeypatch, 2**12)
    for ours, theirs in zip(*map(jax.tree.leaves, (results(), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_small_caches")
def test_results_of_every_dtype():
    def fun(key, x):
        top = lax.top_k(x.ravel(), 2)
        return {"key": jax.random.fold_in(key, 1), "top": top, "positive": x.sum() > 0}

    key = jax.random.key(3)
    found = jax.jit(fc.slide(fun, WINDOW))(key, IMAGE)
    one = fun(key, IMAGE[30:39, 20:28])
    for all_, theirs in zip(*map(jax.tree.leaves, (found, one)), strict=True):
        ours = all_[30, 20]
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2**14, 2**17])
def test_strips_that_fit_the_memory_give_the_same(monkeypatch, limit):
    sliding = fc.slide(padded, (24, 20), stride=(1, 2))

    def loss(convs, x):
        return (sliding(convs, x) ** 2).mean()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(CONVS, IMAGE)
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2**12)
    monkeypatch.setattr(strips, "_MAX_BYTES", limit)
    monkeypatch.setattr(strips, "CROSSOVERS", CROSSOVERS._replace(strip_bytes=2**12))
    assert "scan" in str(jax.make_jaxpr(sliding)(CONVS, IMAGE))
    actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(CONVS, IMAGE)
    for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
