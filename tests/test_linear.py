"""The layer against its formula, its laws, and finite differences."""

from math import prod

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import initializers
from strategies import linear_cases

import fclayers as fc

HALF = ["bfloat16", "float16"]


@given(linear_cases())
def test_is_the_formula(case):
    y = fc.apply_linear(case.params(), jnp.asarray(case.x, jnp.float32), axis=case.axis)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, case.expected(), rtol=1e-5, atol=1e-5)


@given(linear_cases())
def test_is_the_formula_in_float64(case):
    with jax.enable_x64(True):
        y = fc.apply_linear(case.params(jnp.float64), jnp.asarray(case.x), axis=case.axis)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, case.expected(), rtol=1e-12, atol=1e-12)


@given(linear_cases(complex=True))
def test_is_the_formula_in_complex64(case):
    x = jnp.asarray(case.x, jnp.complex64)
    y = fc.apply_linear(case.params(jnp.complex64), x, axis=case.axis)
    assert y.dtype == jnp.complex64
    np.testing.assert_allclose(y, case.expected(), rtol=1e-5, atol=1e-5)


@given(linear_cases(), st.sampled_from(HALF))
def test_half_precision_rounds_once(case, dtype):
    params, x = case.params(dtype), jnp.asarray(case.x, dtype)
    y = fc.apply_linear(params, x, axis=case.axis)
    assert y.dtype == dtype
    as_float64 = [None if a is None else np.asarray(a, np.float64) for a in (*params, x)]
    expected = case.expected(*as_float64)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1.01 * half_ulp, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_accumulates_in_float32(dtype):
    ones = jnp.ones((2, 4096), dtype)
    params = fc.LinearParams(jnp.full((4096, 1), 1 / 64, dtype), jnp.full(1, 1 / 64, dtype))
    expected = np.asarray(64 + 1 / 64, jnp.dtype(dtype))
    np.testing.assert_array_equal(fc.apply_linear(params, ones), np.full((2, 1), expected))


@given(linear_cases(), st.integers(0, 99))
def test_is_linear(case, seed):
    layer = case.params()._replace(bias=None)
    x1, x2 = np.random.default_rng(seed).standard_normal((2, *case.x.shape)).astype(np.float32)
    together = fc.apply_linear(layer, 2 * x1 - 3 * x2, axis=case.axis)
    apart = 2 * fc.apply_linear(layer, x1, axis=case.axis) - 3 * fc.apply_linear(
        layer, x2, axis=case.axis
    )
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-4)


@given(linear_cases(batch_ndim=(1, 3), batch_size=(1, 4)))
def test_vmap_over_samples_is_the_batch(case):
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    x = np.moveaxis(case.x, axes, range(-len(axes), 0)).astype(np.float32)
    layer, last_axes = case.params(), tuple(range(-len(axes), 0))

    def apply(x):
        return fc.apply_linear(layer, x, axis=last_axes)

    for_samples = apply
    for _ in range(x.ndim - len(axes)):
        for_samples = jax.vmap(for_samples)
    np.testing.assert_allclose(for_samples(x), apply(x), rtol=1e-5, atol=1e-5)


@given(linear_cases(batch_size=(1, 3)))
def test_axis_is_a_permutation(case):
    axes = case.axis if isinstance(case.axis, tuple) else (case.axis,)
    x = case.x.astype(np.float32)
    last = np.moveaxis(x, axes, range(-len(axes), 0))
    np.testing.assert_allclose(
        fc.apply_linear(case.params(), x, axis=case.axis),
        fc.apply_linear(case.params(), last, axis=tuple(range(-len(axes), 0))),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(max_examples=8)
@given(linear_cases(batch_ndim=(0, 1), batch_size=(1, 3)))
def test_gradients_are_finite_differences(case):
    with jax.enable_x64(True):
        jax.test_util.check_grads(
            lambda params, x: fc.apply_linear(params, x, axis=case.axis),
            (case.params(jnp.float64), jnp.asarray(case.x)),
            order=1,
        )


@pytest.mark.slow
@pytest.mark.parametrize("batch_shape", [(), (1,), (3,)])
def test_second_derivatives_are_finite_differences(batch_shape):
    with jax.enable_x64(True):
        params = fc.init_linear(jax.random.key(0), 4, 2, dtype=jnp.float64)
        x = jnp.linspace(-1, 1, 4 * prod(batch_shape)).reshape(*batch_shape, 4)
        jax.test_util.check_grads(
            lambda params, x: jnp.sin(fc.apply_linear(params, x)), (params, x), order=2
        )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 1040), (1025, 1024), (6, 5)])
@pytest.mark.parametrize("batch_shape", [(), (1,), (1, 1)])
def test_single_row_is_the_row_of_a_batch(batch_shape, shape):
    """One row has a formulation of its own on CPUs; it must not show."""
    params = fc.init_linear(jax.random.key(0), *shape)
    x = jax.random.normal(jax.random.key(1), (2, shape[0]))
    cotangent = jax.random.normal(jax.random.key(2), (shape[1],))

    def value_and_gradients(x, cotangent):
        y, pullback = jax.vjp(fc.apply_linear, params, x)
        return y, pullback(cotangent)

    row, row_gradients = value_and_gradients(
        x[0].reshape(*batch_shape, -1), cotangent.reshape(*batch_shape, -1)
    )
    both, both_gradients = value_and_gradients(x, jnp.stack([cotangent, 0 * cotangent]))
    np.testing.assert_allclose(row.ravel(), both[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(row_gradients[0], both_gradients[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(row_gradients[1].ravel(), both_gradients[1][0], rtol=1e-4, atol=1e-5)


def test_single_rows_under_vmap_with_their_own_weights():
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = jax.vmap(lambda key: fc.init_linear(key, 1024, 1024))(keys)
    x = jax.random.normal(jax.random.key(1), (3, 1024))
    y, gradients = jax.vmap(jax.value_and_grad(lambda p, x: fc.apply_linear(p, x).sum()))(
        ensemble, x
    )
    expected = jnp.einsum("ni,nij->n", x, ensemble.weight) + ensemble.bias.sum(-1)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        gradients.weight, jnp.broadcast_to(x[..., None], ensemble.weight.shape), rtol=1e-6
    )


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        params = fc.init_linear(jax.random.key(0), (2, 3), 4)
        x = jax.random.normal(jax.random.key(1), (5, 3, 2))
        y = self.variant(lambda params, x: fc.apply_linear(params, x, axis=(2, 1)))(params, x)
        chex.assert_shape(y, (5, 4))
        with jax.disable_jit():
            eager = fc.apply_linear(params, x, axis=(2, 1))
        chex.assert_trees_all_close(y, eager, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_init_with_and_without_jit(self):
        params = self.variant(lambda key: fc.init_linear(key, 7, (2, 2)))(jax.random.key(0))
        chex.assert_trees_all_close(params, fc.init_linear(jax.random.key(0), 7, (2, 2)))


def test_repeated_calls_trace_once():
    traced = jax.jit(chex.assert_max_traces(fc.apply_linear.__wrapped__, n=1))
    for seed in range(3):
        params = fc.init_linear(jax.random.key(seed), 3, 2)
        traced(params, jnp.full((4, 3), float(seed)))

    fc.apply_linear(params, jnp.ones((4, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "dot_general", lambda *_, **__: pytest.fail("traced again"))
        fc.apply_linear(params, jnp.zeros((4, 3)))
        fc.apply_linear(params._replace(weight=2 * params.weight), jnp.ones((4, 3)))


def test_compute_dtype_and_promotion():
    params = fc.init_linear(jax.random.key(0), 3, 2)
    x = jnp.ones((4, 3))
    assert fc.apply_linear(params, x, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert fc.apply_linear(params, x.astype(jnp.bfloat16)).dtype == jnp.float32
    assert fc.apply_linear(params, jnp.ones((4, 3), jnp.int32)).dtype == jnp.float32
    assert fc.apply_linear(params, np.ones((4, 3), np.int8)).dtype == jnp.float32
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert fc.apply_linear(half, jnp.ones((4, 3), jnp.int32)).dtype == jnp.bfloat16
    narrow = fc.LinearParams(jnp.ones((3, 2), jnp.int8), None)
    np.testing.assert_array_equal(fc.apply_linear(narrow, jnp.ones(3, jnp.int8)), np.int8([3, 3]))
    exact = fc.apply_linear(params, x, precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(exact, x @ params.weight + params.bias, rtol=1e-6)


@pytest.mark.parametrize("batch_shape", [(), (1,), (4,)])
def test_linear_transpose(batch_shape):
    params = fc.init_linear(jax.random.key(0), 1024, 1030, bias=False)
    x = jax.random.normal(jax.random.key(1), (*batch_shape, 1024))
    y = jax.random.normal(jax.random.key(2), (*batch_shape, 1030))
    (x_bar,) = jax.linear_transpose(lambda x: fc.apply_linear(params, x), x)(y)
    np.testing.assert_allclose(x_bar, y @ params.weight.T, rtol=1e-4, atol=1e-4)
    (weight_bar,) = jax.linear_transpose(
        lambda weight: fc.apply_linear(fc.LinearParams(weight, None), x), params.weight
    )(y)
    expected = jnp.einsum("ni,no->io", jnp.atleast_2d(x), jnp.atleast_2d(y))
    np.testing.assert_allclose(weight_bar, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_shape", [(1,), (4,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_promotes_and_broadcasts_explicitly(batch_shape, dtype):
    params = fc.init_linear(jax.random.key(0), 3, 2)
    x = jnp.ones((*batch_shape, 3), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y = fc.apply_linear(params, x, dtype=dtype)
        jax.grad(lambda params: fc.apply_linear(params, x, dtype=dtype).sum())(params)
    np.testing.assert_array_equal(y, fc.apply_linear(params, x, dtype=dtype))


def test_single_row_on_an_explicit_mesh():
    mesh = jax.sharding.AbstractMesh((2,), ("model",), (jax.sharding.AxisType.Explicit,))

    def sharded(shape, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = fc.LinearParams(sharded((8, 4), "model", None), None)
    gradients = jax.eval_shape(
        jax.grad(lambda params, x: fc.apply_linear(params, x).sum()),
        params,
        sharded((1, 8), None, None),
    )
    assert gradients.weight.sharding.spec == params.weight.sharding.spec


def test_runs_under_scan():
    params = fc.init_linear(jax.random.key(0), 4, 4)
    x = jnp.ones((2, 4))
    y, _ = jax.lax.scan(lambda x, _: (fc.apply_linear(params, x), None), x, length=3)
    for _ in range(3):
        x = fc.apply_linear(params, x)
    np.testing.assert_allclose(y, x, rtol=1e-5)


def test_exports_with_a_symbolic_batch():
    params = fc.init_linear(jax.random.key(0), 3, 2)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    exported = jax.export.export(jax.jit(fc.apply_linear))(params, x)
    for size in (1, 4):
        ones = jnp.ones((size, 3))
        np.testing.assert_allclose(exported.call(params, ones), fc.apply_linear(params, ones))


def test_forward_mode_of_a_single_row_costs_no_weight():
    weight, x = jnp.ones((1024, 1030)), jnp.ones((1, 1024))

    @jax.jit
    def tangent(weight, x, x_dot):
        params = fc.LinearParams(weight, None)
        return jax.jvp(lambda x: fc.apply_linear(params, x), (x,), (x_dot,))

    memory = tangent.lower(weight, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < weight.nbytes / 10


@pytest.mark.parametrize("batch", [1, 2])
def test_precision_is_passed_on(batch):
    params = fc.init_linear(jax.random.key(0), 4, 3)
    jaxpr = jax.make_jaxpr(lambda x: fc.apply_linear(params, x, precision="highest"))
    assert "HIGHEST" in str(jaxpr(jnp.ones((batch, 4))))


def test_no_features_with_any_initializer():
    he = initializers.he_normal()
    assert fc.init_linear(jax.random.key(0), 0, 3, weight_init=he).weight.shape == (0, 3)


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 3), (3, 0), (0, 0), (3, (2, 0))])
def test_no_features(in_features, out_features):
    params = fc.init_linear(jax.random.key(0), in_features, out_features)
    assert not params.weight.size
    y = fc.apply_linear(params, jnp.ones((2, in_features)))
    np.testing.assert_array_equal(y, jnp.broadcast_to(params.bias, y.shape))
    np.testing.assert_array_equal(params.bias, 0)


# Initializers


@pytest.mark.parametrize("features", [(400, 500), ((4, 10, 10), (50, 10))])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
def test_default_init_has_torchs_bounds_and_moments(features, dtype):
    params = fc.init_linear(jax.random.key(0), *features, dtype=dtype)
    bound = 1 / np.sqrt(400)
    for array in params:
        assert array.dtype == dtype
        values = np.asarray(array).ravel()
        values = values.view(np.float32) if dtype == "complex64" else values.astype(np.float64)
        resolution = float(jnp.finfo(dtype).eps) * bound
        standard_error = bound / np.sqrt(3 * values.size)
        assert np.abs(values).max() <= bound + resolution
        assert np.abs(values).max() > 0.98 * bound
        assert abs(values.mean()) < 4 * standard_error + resolution
        np.testing.assert_allclose(values.var(), bound**2 / 3, rtol=6 / np.sqrt(values.size))
        uniform = scipy.stats.uniform(-bound, 2 * bound)
        if dtype == "float32":
            assert scipy.stats.kstest(values, uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_parameters_are_the_rounded_float32_ones(dtype):
    key = jax.random.key(0)
    half, full = fc.init_linear(key, 30, 20, dtype=dtype), fc.init_linear(key, 30, 20)
    chex.assert_trees_all_equal(half, jax.tree.map(lambda a: a.astype(dtype), full))


VARIANCES = {
    "constant": (initializers.constant(0.5), 0),
    "zeros": (initializers.zeros, 0),
    "ones": (initializers.ones, 0),
    "normal": (initializers.normal(0.1), 0.01),
    "truncated_normal": (initializers.truncated_normal(0.1), 0.01 * 0.7737),
    "uniform": (initializers.uniform(0.1), 0.01 / 12),
    "glorot_normal": (initializers.glorot_normal(), 2 / (600 + 400)),
    "glorot_uniform": (initializers.glorot_uniform(), 2 / (600 + 400)),
    "he_normal": (initializers.he_normal(), 2 / 600),
    "he_uniform": (initializers.he_uniform(), 2 / 600),
    "lecun_normal": (initializers.lecun_normal(), 1 / 600),
    "lecun_uniform": (initializers.lecun_uniform(), 1 / 600),
    "variance_scaling": (initializers.variance_scaling(3, "fan_out", "normal"), 3 / 400),
    "orthogonal": (initializers.orthogonal(), 1 / 600),
}


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_initializers_see_the_layers_fans(name, dtype):
    initializer, variance = VARIANCES[name]
    weight, _ = fc.init_linear(
        jax.random.key(0), (6, 100), (20, 20), weight_init=initializer, dtype=dtype
    )
    assert weight.shape == (6, 100, 20, 20)
    assert weight.dtype == dtype
    np.testing.assert_allclose(np.asarray(weight, np.float64).var(), variance, rtol=0.05, atol=1e-9)
    if name == "orthogonal":
        matrix = np.asarray(weight, np.float64).reshape(600, 400)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(400), atol=0.02)


def test_every_jax_initializer_is_tested():
    convolutional = {"Initializer", "delta_orthogonal"}
    synonyms = {"xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform"}
    names = {name for name in dir(initializers) if not name.startswith("_")}
    assert names - convolutional - synonyms == VARIANCES.keys()


def test_bias_init_and_no_bias():
    key = jax.random.key(0)
    params = fc.init_linear(key, 3, (2, 5), bias_init=initializers.ones)
    np.testing.assert_array_equal(params.bias, np.ones((2, 5)))
    chex.assert_trees_all_equal(
        fc.init_linear(key, 3, (2, 5), bias=False), params._replace(bias=None)
    )


def test_init_takes_no_memory_under_eval_shape():
    shapes = jax.eval_shape(lambda: fc.init_linear(jax.random.key(0), 10**6, 10**6))
    assert shapes.weight.shape == (10**6, 10**6)


# Bilinear


@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16", "float16", "complex64"]),
)
def test_bilinear_is_the_formula(batch, in1, in2, out, bias, dtype):
    params = fc.init_bilinear(jax.random.key(0), in1, in2, out, bias=bias, dtype=dtype)
    rng = np.random.default_rng(0)
    x1, x2 = rng.standard_normal((*batch, in1)), rng.standard_normal((*batch, in2))
    x1, x2 = jnp.asarray(x1, dtype), jnp.asarray(x2, dtype)
    y = fc.apply_bilinear(params, x1, x2)
    wide = [None if a is None else np.asarray(a, np.complex128) for a in (x1, x2, *params)]
    expected = np.einsum("...i,...j,ijk->...k", *wide[:3]) + (wide[3] if bias else 0)
    assert y.dtype == dtype
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.asarray(y, np.complex128), expected, rtol=1.01 * half_ulp, atol=1e-5
    )


def test_bilinear_gradients_are_finite_differences():
    with jax.enable_x64(True):
        params = fc.init_bilinear(jax.random.key(0), 3, 4, 2, dtype=jnp.float64)
        x1, x2 = jnp.linspace(0, 1, 6).reshape(2, 3), jnp.linspace(1, 2, 8).reshape(2, 4)
        jax.test_util.check_grads(fc.apply_bilinear, (params, x1, x2), order=2)
