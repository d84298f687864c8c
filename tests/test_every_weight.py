"""Every form of weight × every layer × every function: equal to the materialized layer.

Or an error that says why it cannot be.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import CIRCULANT, FORMS, Circulant, in_ndim, weight_of
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc

KEY = jax.random.key(0)
X = {
    "linear": jax.random.normal(KEY, (5, 12)),
    "no bias": jax.random.normal(KEY, (5, 12)),
    "several axes": jax.random.normal(KEY, (5, 2, 3, 4)),
    "several outputs": jax.random.normal(KEY, (5, 3, 4)),
    "conv": jax.random.normal(KEY, (2, 6, 5, 4)),
    "conv with groups": jax.random.normal(KEY, (2, 6, 5, 8)),
    "converted": jax.random.normal(KEY, (2, 4, 5, 4)),
    "bilinear": (jax.random.normal(KEY, (5, 4)), jax.random.normal(KEY, (5, 6))),
}
LAYERS = {
    "linear": fc.init_linear(KEY, 12, 8),
    "no bias": fc.init_linear(KEY, 12, 8, bias=False),
    "several axes": fc.init_linear(KEY, (2, 3, 4), 8),
    "several outputs": fc.init_linear(KEY, (3, 4), (2, 8)),
    "conv": fc.init_conv(KEY, (3, 2), 4, 8),
    "conv with groups": fc.init_conv(KEY, (3, 2), 8, 8, groups=2),
    "converted": fc.init_linear(KEY, (2, 3, 4), 8),
    "bilinear": fc.init_bilinear(KEY, 4, 6, 8),
}
APPLY = {
    "linear": fc.apply_linear,
    "no bias": fc.apply_linear,
    "several axes": partial(fc.apply_linear, axis=(1, 2, 3)),
    "several outputs": partial(fc.apply_linear, axis=(1, 2)),
    "conv": partial(fc.apply_conv, padding="SAME", stride=(2, 1)),
    "conv with groups": partial(fc.apply_conv, groups=2),
    "converted": fc.apply_conv,
    "bilinear": lambda params, x, **kwargs: fc.apply_bilinear(params, *x, **kwargs),
}
# Every form with two layers, every layer with three forms; the other cells are slow together.
CELLS = [
    pytest.param(layer, form, marks=[] if (i + j) % len(LAYERS) == 0 else pytest.mark.slow)
    for i, layer in enumerate(LAYERS)
    for j, form in enumerate(FORMS)
]


def make(layer, form):
    params = FORMS[form](LAYERS[layer])
    return fc.linear_to_conv(params) if layer == "converted" else params


@pytest.mark.parametrize(("layer", "form"), CELLS)
def test_a_layer_is_its_materialized_self(layer, form):
    params, apply, x = make(layer, form), APPLY[layer], X[layer]
    plain = fc.materialize(params)
    assert type(plain) is type(params)
    assert isinstance(plain.weight, jax.Array)
    np.testing.assert_allclose(
        plain.weight, weight_of(params.weight, in_ndim(params)), rtol=1e-5, atol=1e-6
    )
    y = apply(plain, x)
    np.testing.assert_allclose(apply(params, x), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(apply)(params, x), y, rtol=1e-4, atol=1e-5)

    half = apply(params, x, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.06)

    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    both = jax.vmap(apply, (0, None))(stacked, x)
    np.testing.assert_allclose(both, jnp.stack([y, y]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "form"), CELLS)
def test_gradients_go_through_the_materialized_weight(layer, form):
    with jax.enable_x64(True):
        wide = partial(jax.tree.map, lambda a: a.astype(jnp.float64))
        params, apply, x = FORMS[form](wide(LAYERS[layer])), APPLY[layer], wide(X[layer])
        if layer == "converted":
            params = fc.linear_to_conv(params)

        def loss(params, x):
            return jnp.sin(apply(params, x)).sum()

        def through(params, x):
            return loss(fc.materialize(params), x)

        actual, expected = (
            jax.jit(jax.grad(function, (0, 1), allow_int=True))(params, x)
            for function in (loss, through)
        )
        for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            if ours.dtype != jax.dtypes.float0:
                # The gradient of an int8 weight's scale is a sum of large numbers.
                scale = 1e3 * (1 + np.abs(theirs).max(initial=0))
                np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13 * scale)


HEADS = [
    pytest.param(form, bias, marks=[] if bias and "block" in form else pytest.mark.slow)
    for form in FORMS
    for bias in (True, False)
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bias"), HEADS)
def test_heads_and_mlps(form, bias):
    mlp = tuple(FORMS[form](layer) for layer in fc.init_mlp(KEY, [12, 8, 20], bias=bias))
    plain, x, labels = fc.materialize(mlp), X["linear"], jnp.arange(5) * 3
    np.testing.assert_allclose(fc.apply_mlp(mlp, x), fc.apply_mlp(plain, x), rtol=1e-4, atol=1e-5)
    head, features = mlp[1], jax.random.normal(KEY, (5, 8))
    logits = fc.apply_linear(plain[1], features)
    loss = partial(fc.linear_cross_entropy, labels=labels, chunk_size=7)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(loss(head, features), expected, rtol=1e-4, atol=1e-5)
    values, classes = fc.linear_top_k(head, features, 4, chunk_size=7)
    np.testing.assert_allclose(values, jax.lax.top_k(logits, 4)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(fc.linear_argmax(head, features), classes[:, 0])

    def through(head):
        logits = fc.apply_linear(fc.materialize(head), features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    ours = jax.grad(lambda head: loss(head, features).sum(), allow_int=True)(head)
    theirs = jax.grad(through, allow_int=True)(head)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * (1 + np.abs(b).max(initial=0)))


@pytest.mark.parametrize(("layer", "form"), CELLS)
def test_files_specs_and_tables(layer, form, tmp_path):
    params = {"layer": make(layer, form)}
    path = tmp_path / "layer.safetensors"
    fc.interop.save_safetensors(path, params)
    chex.assert_trees_all_equal(fc.interop.load_safetensors(path, params), params)
    for kind in ("column", "row", "replicated", "fsdp"):
        specs = fc.partition_specs(params, kind)
        assert jax.tree.structure(specs) == jax.tree.structure(params)
        pairs = zip(*map(jax.tree.leaves, (params, specs)), strict=True)
        assert all(len(spec) in (0, array.ndim) for array, spec in pairs)
    summary = fc.summarize(params)
    assert summary.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all(row.path.startswith("layer.") for row in summary.rows)
    numbers = fc.muon_dimension_numbers(params)["layer"]
    assert numbers.bias is None
    original = LAYERS[layer]
    if layer != "converted":
        expected = np.asarray(original.weight, np.float64)
        actual = weight_of(params["layer"].weight, in_ndim(params["layer"]))
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        found = fc.reconstruction_error({"layer": original}, params)["layer"]
        np.testing.assert_allclose(found, error, rtol=1e-3, atol=1e-6)
    table = fc.compression_table(
        params["layer"],
        X[layer],
        fun=APPLY[layer],
        forms={"materialized": fc.materialize},
    )
    assert [row.form for row in table.rows] == ["unchanged", "materialized"]
    assert table.rows[1].error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framework", ["torch", "flax", "haiku", "equinox", "keras"])
def test_exports_are_materialized(form, framework):
    to = getattr(fc.interop, f"to_{framework}")
    for layer in ("linear", "no bias", "conv", "conv with groups", "converted"):
        params = {"a": make(layer, form)}
        chex.assert_trees_all_close(to(params), to(fc.materialize(params)))
    for layer in ("several axes", "several outputs"):
        with pytest.raises(ValueError, match=f"to_{framework}: .* a weight of shape"):
            to({"a": make(layer, form)})
    if framework == "torch":
        exported = fc.interop.to_torch(make("bilinear", form))
        assert exported["weight"].shape == (8, 4, 6)
    else:
        with pytest.raises(TypeError, match=f"to_{framework}: .* got BilinearParams"):
            to({"a": make("bilinear", form)})


@pytest.mark.parametrize("form", FORMS)
def test_conversion_both_ways(form):
    layer = make("several axes", form)
    conv = fc.linear_to_conv(layer)
    assert type(conv.weight) is type(layer.weight)
    x = X["several axes"]
    expected = fc.apply_linear(fc.materialize(layer), x, axis=(1, 2, 3))
    np.testing.assert_allclose(fc.apply_conv(conv, x)[:, 0, 0], expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(
        fc.materialize(conv), fc.linear_to_conv(fc.materialize(layer)), rtol=1e-5, atol=1e-6
    )
    back = fc.conv_to_linear(conv, x.shape[1:])
    y = fc.apply_linear(back, x, axis=(1, 2, 3))[:, 0, 0]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["linear", "several axes", "conv", "converted"])
def test_exported_files(layer, form, tmp_path):
    params, x = make(layer, form), X[layer]
    fc.export_apply(APPLY[layer], params, x[:1], tmp_path / "layer.jax")
    y = fc.load_exported(tmp_path / "layer.jax")(x)
    np.testing.assert_allclose(y, APPLY[layer](params, x), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_dora_is_the_papers_formula(in_features, out_features, rank, seed):
    """W' = m · (W0 + B A) / ‖W0 + B A‖ by columns, with m = ‖W0‖ at first."""
    with jax.enable_x64(True):
        rank = min(rank, in_features, out_features)
        rng = np.random.default_rng(seed)
        base = rng.standard_normal((in_features, out_features))
        layer = fc.LinearParams(jnp.asarray(base), None)
        dora = fc.weight_norm(fc.add_lora(jax.random.key(seed), layer, rank=rank, alpha=3.0))
        m = np.linalg.norm(base, axis=0)
        np.testing.assert_allclose(dora.weight.magnitude, m, rtol=1e-12)
        np.testing.assert_allclose(fc.materialize(dora).weight, base, rtol=1e-12, atol=1e-12)
        b, a = rng.standard_normal((in_features, rank)), rng.standard_normal((rank, out_features))
        adapter = dora.weight.direction._replace(down=jnp.asarray(b), up=jnp.asarray(a))
        dora = dora._replace(weight=dora.weight._replace(direction=adapter))
        v = base + 3.0 / rank * b @ a
        expected = m * v / np.linalg.norm(v, axis=0)
        np.testing.assert_allclose(fc.materialize(dora).weight, expected, rtol=1e-12, atol=1e-12)
        x = rng.standard_normal((3, in_features))
        y = fc.apply_linear(dora, jnp.asarray(x))
        np.testing.assert_allclose(y, x @ expected, rtol=1e-11, atol=1e-11)


def test_columns_of_zeros_stay_zero_and_have_gradients():
    layer = fc.weight_norm(fc.LinearParams(jnp.array([[0.0, 3.0], [0.0, 4.0]]), None))
    np.testing.assert_array_equal(fc.materialize(layer).weight, [[0, 3], [0, 4]])
    gradients = jax.grad(lambda p: fc.apply_linear(p, jnp.ones(2)).sum())(layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.fixture
def circulant():
    fc.register_weight(Circulant, CIRCULANT)
    return fc.LinearParams(Circulant(jnp.arange(6.0)), jnp.arange(6.0))


def test_a_form_from_outside(circulant, tmp_path):
    """A form with nothing but shapes, axes and a dense array works everywhere."""
    plain = fc.materialize(circulant)
    np.testing.assert_array_equal(plain.weight[2], [4, 5, 0, 1, 2, 3])
    x = jax.random.normal(KEY, (4, 6))
    y = fc.apply_linear(plain, x)
    np.testing.assert_allclose(fc.apply_linear(circulant, x), y, rtol=1e-5)
    np.testing.assert_allclose(
        fc.linear_cross_entropy(circulant, x, jnp.arange(4), chunk_size=4),
        optax.softmax_cross_entropy_with_integer_labels(y, jnp.arange(4)),
        rtol=1e-5,
        atol=1e-5,
    )
    adapted = fc.add_lora(KEY, circulant, rank=2, alpha=2.0)
    np.testing.assert_allclose(fc.apply_linear(adapted, x), y, rtol=1e-5)
    gradients = jax.grad(lambda p: fc.apply_linear(p, x).sum())(circulant)
    expected = jax.grad(lambda p: fc.apply_linear(fc.materialize(p), x).sum())(circulant)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5)
    assert fc.partition_specs(circulant, "column").weight.first == jax.P("model")
    path = tmp_path / "c.safetensors"
    fc.interop.save_safetensors(path, circulant)
    assert sorted(fc.interop.load_safetensors(path)) == ["bias", "weight.first"]
    assert fc.interop.to_torch(circulant)["weight"].shape == (6, 6)
    conv = fc.linear_to_conv(circulant)
    np.testing.assert_allclose(fc.apply_conv(conv, x[None, None])[0, 0], y, rtol=1e-5)


def test_what_broke_before_the_weight_had_a_form():
    mlp = fc.init_mlp(KEY, [4 * 4 * 3, 8, 5])
    x = jax.random.normal(KEY, (2, 4, 4, 3))
    convs = fc.mlp_to_conv(fc.quantize(mlp), (4, 4))
    y = fc.apply_conv(fc.materialize(convs)[0], x)
    np.testing.assert_allclose(y, fc.apply_conv(convs[0], x), rtol=1e-5, atol=1e-5)
    adapted = fc.mlp_to_conv(fc.add_lora(KEY, mlp, rank=2, alpha=2.0), (4, 4))
    y = fc.apply_conv(fc.materialize(adapted)[0], x)
    np.testing.assert_allclose(y, fc.apply_conv(adapted[0], x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="to_torch: PyTorch has no layer with a weight of shape"):
        fc.interop.to_torch(fc.init_linear(KEY, (7, 512), 10))


@pytest.mark.parametrize("form", FORMS)
def test_reprs_are_short(form):
    text = repr(FORMS[form](LAYERS["linear"]))
    assert len(text) < 200
    assert text.startswith("LinearParams(weight=")
    assert text.endswith("bias=f32[8])")


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 5), (5, 0), (0, 0)])
def test_integer_weights_without_elements(inputs, outputs):
    params = fc.quantize(fc.LinearParams(jnp.ones((inputs, outputs)), jnp.arange(float(outputs))))
    y = fc.apply_linear(params, jnp.ones((2, inputs)))
    np.testing.assert_array_equal(y, np.tile(np.arange(outputs), (2, 1)))
