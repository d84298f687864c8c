"""The forms of weight: what each stands for, and how far it is from the weight it was made of."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_calls import bad_calls
from forms import FORMS, in_ndim
from forms import weight_of as dense_weight
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import linear_cases

import fclayers as fc

KEY = jax.random.key(0)
LAYER = fc.init_linear(KEY, (4, 3, 5), 7)
NETWORK = {"body": fc.init_mlp(KEY, [20, 16, 12]), "head": fc.init_linear(KEY, 12, 6)}
OTHER_FORMS = sorted(set(FORMS) - {"plain"})
# Forms around forms are slow together.
NESTED = ("adapted blocks", "adapted low rank", "dora", "dora on int8", "normalized int8")
SOME_FORMS = [
    pytest.param(form, marks=[pytest.mark.slow] if form in NESTED else []) for form in OTHER_FORMS
]


def weight_of(params):
    """The weight of a layer in float64 NumPy, written out by the definition of its form."""
    return dense_weight(params.weight, in_ndim(params))


@given(linear_cases(), st.sampled_from(OTHER_FORMS), st.booleans())
def test_apply_linear_multiplies_by_the_weight_that_a_form_stands_for(case, form, jitted):
    in_ndim = len(case.axis) if isinstance(case.axis, tuple) else 1
    assume(case.bias is not None or case.weight.ndim == in_ndim + 1)
    with jax.enable_x64(True):
        params = FORMS[form](case.params(jnp.float64))
        apply = partial(fc.apply_linear, axis=case.axis)
        y = (jax.jit(apply) if jitted else apply)(params, jnp.asarray(case.x))
        np.testing.assert_allclose(
            y, case.expected(weight=weight_of(params)), rtol=1e-12, atol=1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_layers_larger_than_a_tile(form, rows):
    layer = fc.init_linear(KEY, 1000, 300)
    params, x = FORMS[form](layer), jax.random.normal(KEY, (rows, 1000))
    expected = np.asarray(x, np.float64) @ weight_of(params) + np.asarray(layer.bias)
    np.testing.assert_allclose(fc.apply_linear(params, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", SOME_FORMS)
def test_forms_under_vmap_grad_and_half_precision(form):
    params, x = FORMS[form](LAYER), jax.random.normal(KEY, (6, 4, 3, 5))
    apply = partial(fc.apply_linear, axis=(-3, -2, -1))
    y = apply(params, x)
    np.testing.assert_allclose(jax.vmap(apply, (None, 0))(params, x), y, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    np.testing.assert_allclose(jax.vmap(apply)(stacked, x[:2]), y[:2], rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: (apply(params, x) ** 2).sum())(x)
    expected = np.einsum("...o,hwco->...hwc", 2 * np.asarray(y), weight_of(params))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    half = apply(params, x, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.05)


@pytest.mark.parametrize("form", SOME_FORMS)
def test_an_mlp_of_any_form(form):
    mlp = fc.init_mlp(KEY, [20, 16, 12])
    params = tuple(FORMS[form](layer) for layer in mlp)
    x = jax.random.normal(KEY, (3, 20))
    plain = tuple(
        layer._replace(weight=jnp.asarray(weight_of(new), jnp.float32))
        for layer, new in zip(mlp, params, strict=True)
    )
    np.testing.assert_allclose(
        fc.apply_mlp(params, x), fc.apply_mlp(plain, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", SOME_FORMS)
@pytest.mark.parametrize("order", ["HWC", "CHW"])
@pytest.mark.parametrize("edge", [0, 3])
def test_a_head_of_any_form_becomes_convolutions(form, order, edge):
    head = fc.init_mlp(KEY, [4 * 3 * 5, 16, 7])
    params = tuple(FORMS[form](layer) for layer in head)
    if "block" in form and not (form == "int8 in blocks" and order == "HWC"):
        with pytest.raises(ValueError, match=r"linear_to_conv: .*blocks.* materialize the layer"):
            fc.mlp_to_conv(params, (4, 3), order=order)
        params = fc.materialize(params)
    convs = fc.mlp_to_conv(params, (4, 3), order=order)
    x = jax.random.normal(KEY, (2, 4 + edge, 3 + edge, 5))
    scores = fc.apply_conv(convs[1], jax.nn.relu(fc.apply_conv(convs[0], x)))
    window = x[:, edge:, edge:]
    flat = (window if order == "HWC" else window.transpose(0, 3, 1, 2)).reshape(2, -1)
    np.testing.assert_allclose(
        scores[:, edge, edge], fc.apply_mlp(params, flat), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", SOME_FORMS)
def test_files_and_frameworks_take_every_form(form, tmp_path):
    layer = fc.init_linear(KEY, 20, 6)
    params = {"head": FORMS[form](layer)}
    fc.interop.save_safetensors(tmp_path / "head.safetensors", params)
    chex.assert_trees_all_equal(
        fc.interop.load_safetensors(tmp_path / "head.safetensors", params), params
    )
    for to, from_ in (("torch", fc.interop.from_torch), ("flax", fc.interop.from_flax)):
        back = from_(getattr(fc.interop, f"to_{to}")(params))["head"]
        assert isinstance(back, fc.LinearParams)
        np.testing.assert_allclose(back.weight, weight_of(params["head"]), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(back.bias, layer.bias)


def test_summaries_name_the_forms():
    printed = str(fc.summarize(tuple(make(fc.init_linear(KEY, 20, 6)) for make in FORMS.values())))
    for kind in ("Linear", "LowRank", "Lora", "Int8", "WeightNorm", "BlockDiagonal"):
        assert kind in printed


matrices = st.builds(
    lambda rows, columns, seed: np.random.default_rng(seed).standard_normal((rows, columns)),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 99),
)


@given(matrices, st.data())
def test_low_rank_is_the_nearest_product(matrix, data):
    rank = data.draw(st.integers(1, min(matrix.shape)))
    with jax.enable_x64(True):
        layer = fc.LinearParams(jnp.asarray(matrix), None)
        factors = fc.low_rank(layer, rank=rank)
        assert factors.weight.down.shape == (len(matrix), rank)
        s = np.linalg.svd(matrix, compute_uv=False)
        error = np.linalg.norm(weight_of(factors) - matrix)
        np.testing.assert_allclose(error, np.linalg.norm(s[rank:]), atol=1e-12)
        np.testing.assert_allclose(
            fc.reconstruction_error(layer, factors)[""], error / np.linalg.norm(s), atol=1e-12
        )


@given(matrices, st.floats(0.01, 1))
def test_energy_takes_the_smallest_rank_that_keeps_it(matrix, energy):
    with jax.enable_x64(True):
        factors = fc.low_rank(fc.LinearParams(jnp.asarray(matrix), None), energy=energy)
    kept = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
    rank = factors.weight.down.shape[-1]
    assert kept[rank - 1] >= energy * kept[-1] * (1 - 1e-12)
    assert rank == 1 or kept[rank - 2] < energy * kept[-1] * (1 + 1e-12)


def test_full_rank_is_exact_to_rounding():
    factors = fc.low_rank(LAYER, energy=1.0)
    assert factors.weight.down.shape == (4, 3, 5, 7)
    np.testing.assert_allclose(weight_of(factors), LAYER.weight, atol=1e-6)
    zero = fc.low_rank(LAYER._replace(weight=jnp.zeros((4, 3, 5, 7))), energy=0.5)
    assert not weight_of(zero).any()


def test_adapters_change_nothing_until_they_train_and_then_only_they_change():
    network = fc.add_lora(jax.random.key(1), NETWORK["body"], rank=4, alpha=8)
    x, labels = jax.random.normal(KEY, (32, 20)), jnp.arange(32) % 12
    chex.assert_trees_all_equal(fc.apply_mlp(network, x), fc.apply_mlp(NETWORK["body"], x))
    mask = fc.lora_mask(network)
    assert jax.tree.leaves(mask) == [False, True, True, False, False] * 2
    optimizer = optax.partition({True: optax.adamw(1e-2), False: optax.set_to_zero()}, mask)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            logits = fc.apply_mlp(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state, losses = network, optimizer.init(network), []
    for _ in range(30):
        params, opt_state, value = step(params, opt_state)
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    for trained, layer in zip(params, network, strict=True):
        frozen = [(one.weight.base, one.weight.scale, one.bias) for one in (trained, layer)]
        chex.assert_trees_all_equal(*frozen)
        assert (trained.weight.up != layer.weight.up).any()
        assert (trained.weight.down != layer.weight.down).any()
    merged = fc.materialize(params)
    np.testing.assert_allclose(fc.apply_mlp(merged, x), fc.apply_mlp(params, x), atol=1e-5)
    for layer, new in zip(merged, params, strict=True):
        np.testing.assert_allclose(layer.weight, weight_of(new), atol=1e-6)


def test_mask_has_no_true_inside_the_base():
    low = fc.low_rank(NETWORK["head"], rank=2)
    mask = fc.lora_mask({"head": fc.add_lora(KEY, low, rank=2, alpha=2), "tail": low})
    assert mask["head"].weight.base == mask["tail"].weight == fc.LowRank(False, False)


def test_adapters_have_keys_of_their_own():
    network = fc.add_lora(KEY, fc.init_mlp(KEY, [8, 8, 8]), rank=2, alpha=2)
    assert (network[0].weight.down != network[1].weight.down).any()


EXTREMES = [0.0, 1e-40, 8e-37, 1e-30, 1.0, -127.0, 3e38]


@given(
    st.lists(
        st.lists(
            st.sampled_from(EXTREMES) | st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([None, 1, 2, 3, 6]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_no_weight_is_off_by_more_than_half_a_step(columns, block_size, dtype):
    weight = jnp.asarray(np.array(columns).T.clip(-6e4, 6e4), dtype)
    quantized = fc.quantize(fc.LinearParams(weight, None), block_size=block_size)
    values, scale = quantized.weight
    assert values.dtype == jnp.int8
    assert scale.dtype == dtype
    blocks = np.asarray(weight, np.float64).reshape(len(scale), -1, len(columns))
    scale = np.asarray(scale, np.float64)
    assert np.abs(np.asarray(values, int)).max() <= 127
    largest = np.abs(blocks).max(1)
    # XLA flushes what is smaller than the smallest normal number to zero.
    tiny = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).tiny)
    step = float(jnp.finfo(dtype).eps) * largest / 127 + float(jnp.finfo(dtype).smallest_subnormal)
    assert (scale <= largest / 127 + step + tiny).all()
    error = np.abs(weight_of(quantized) - np.asarray(weight, np.float64)).reshape(blocks.shape)
    assert (error <= scale[:, None] * (0.5 + 1e-5) + tiny).all()


def test_zero_and_constant_columns_are_exact():
    weight = jnp.array([[0.0, 0.7, -3.0]] * 5)
    layer = fc.LinearParams(weight, None)
    np.testing.assert_array_equal(fc.quantize(layer).weight.values, [[0, 127, -127]] * 5)
    np.testing.assert_allclose(fc.materialize(fc.quantize(layer)).weight, weight, rtol=1e-6)


def test_int8_takes_a_quarter_of_the_bytes():
    layer = fc.init_linear(KEY, 1024, 256, bias=False)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(fc.quantize(layer)))
    assert size <= 0.251 * layer.weight.nbytes


CHANGES = {
    "low_rank": partial(fc.low_rank, rank=2),
    "add_lora": partial(fc.add_lora, KEY, rank=2, alpha=4.0),
    "quantize": partial(fc.quantize, block_size=2),
    "weight_norm": fc.weight_norm,
    "block_diagonal": partial(fc.block_diagonal, num_blocks=2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_select_chooses_layers_by_their_paths(change):
    network = NETWORK | {"conv": fc.init_conv(KEY, (3, 3), 4, 4), "name": "net"}
    seen = []

    def select(path):
        seen.append(path)
        return path in ("body.1", "conv")

    changed = change(network, select=select)
    assert seen == ["body.0", "body.1", "conv", "head"]
    for layer, plain in ((changed["body"][1], fc.LinearParams), (changed["conv"], fc.ConvParams)):
        assert isinstance(layer, plain)
        assert not isinstance(layer.weight, jax.Array)
    changed |= {"body": (changed["body"][0], network["body"][1]), "conv": network["conv"]}
    del changed["name"], network["name"]
    chex.assert_trees_all_equal(changed, network)
    everything = change(dict(network))
    assert not isinstance(everything["head"].weight, jax.Array)
    restored = fc.materialize(everything)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, network)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_convolutions_change_before_and_after_conversion(change):
    """What a change makes of a layer is what it makes of the same layer as a convolution."""
    head = fc.init_linear(KEY, (3, 2, 4), 6)
    x = jax.random.normal(KEY, (2, 5, 6, 4))
    before, after = fc.linear_to_conv(change(head)), change(fc.linear_to_conv(head))
    np.testing.assert_allclose(
        fc.apply_conv(before, x), fc.apply_conv(after, x), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        fc.apply_conv(after, x), fc.apply_conv(fc.materialize(after), x), rtol=1e-5, atol=1e-5
    )


def test_shapes_without_arrays():
    shapes = jax.eval_shape(lambda: fc.quantize(fc.init_mlp(KEY, [20, 16]), block_size=5))
    assert shapes[0].weight.scale.shape == (4, 16)
    assert jax.eval_shape(partial(fc.low_rank, rank=2), LAYER).weight.up.shape == (2, 7)


def test_compression_table():
    mlp = fc.init_mlp(KEY, [20, 16, 12])
    x = jax.random.normal(KEY, (8, 20))
    table = fc.compression_table(mlp, x)
    assert [row.path for row in table.rows] == ["0"] * 4 + ["1"] * 4
    first = table.rows[0]
    assert first == fc.CompressionRow("0", "unchanged", 336, 1344, 640, 0.0)
    y = np.asarray(fc.apply_mlp(mlp, x))
    for row in table.rows:
        if row.form == "int8":
            layers = list(mlp)
            layers[int(row.path)] = fc.quantize(layers[int(row.path)])
            changed = np.asarray(fc.apply_mlp(layers, x))
            np.testing.assert_allclose(
                row.error, np.linalg.norm(changed - y) / np.linalg.norm(y), rtol=1e-4
            )
    assert "low rank, 90%" in str(table)
    one = fc.compression_table(mlp[0], x, forms={"rank 2": partial(fc.low_rank, rank=2)})
    assert [row.flops for row in one.rows] == [640, 2 * 2 * (20 + 16)]


def test_compression_table_of_any_network():
    def network(params, x):
        return fc.apply_linear(params["head"], fc.apply_mlp(params["body"], x))

    table = fc.compression_table(NETWORK, jnp.ones((2, 20)), fun=network)
    assert {row.path for row in table.rows} == {"body.0", "body.1", "head"}
    with pytest.raises(TypeError, match=r"compression_table: give the network .* dict"):
        fc.compression_table(NETWORK, jnp.ones((2, 20)))
    with pytest.raises(ValueError, match="compression_table: found no layer in dict"):
        fc.compression_table({"a": 1}, jnp.ones((2, 20)), fun=network)


BAD = {
    "rank larger than the matrix": (
        lambda: fc.low_rank(NETWORK, rank=7, select=lambda path: path == "head"),
        ValueError,
        r"low_rank: rank must be from 1 to 6 for layer 'head', .* \(12, 6\), got 7",
    ),
    "rank of zero": (
        lambda: fc.low_rank(LAYER, rank=0),
        ValueError,
        "low_rank: rank must be from 1 to 7 for the layer",
    ),
    "rank and energy": (
        lambda: fc.low_rank(LAYER, rank=2, energy=0.5),
        ValueError,
        "low_rank: give either rank or energy, got rank=2 and energy=0.5",
    ),
    "neither": (lambda: fc.low_rank(LAYER), ValueError, "low_rank: give either rank or energy"),
    "energy": (
        lambda: fc.low_rank(LAYER, energy=1.5),
        ValueError,
        r"low_rank: energy must be in \(0, 1\], got 1\.5",
    ),
    "adapter's rank": (
        lambda: fc.add_lora(KEY, LAYER, rank=8, alpha=8),
        ValueError,
        "add_lora: rank must be from 1 to 7 for the layer",
    ),
    "two adapters": (
        lambda: fc.add_lora(KEY, fc.add_lora(KEY, LAYER, rank=2, alpha=2), rank=2, alpha=2),
        TypeError,
        "add_lora: the layer has an adapter; materialize it first",
    ),
    "no key": (
        lambda: fc.add_lora(0, LAYER, rank=2, alpha=2),
        TypeError,
        "add_lora: expected one key from jax.random.key, got 0 of type int",
    ),
    "quantized twice": (
        lambda: fc.quantize({"a": LAYER, "b": fc.quantize(LAYER)}),
        TypeError,
        "quantize: expected the weight of layer 'b' to be an array, it is Int8; materialize it",
    ),
    "infinite weight": (
        lambda: fc.quantize({"head": LAYER._replace(weight=LAYER.weight.at[0].set(jnp.inf))}),
        ValueError,
        "quantize: the weight of layer 'head' has infinities or NaNs",
    ),
    "NaN": (
        lambda: fc.low_rank(LAYER._replace(weight=LAYER.weight * jnp.nan), rank=2),
        ValueError,
        "low_rank: the weight of the layer has infinities or NaNs",
    ),
    "complex weight": (
        lambda: fc.quantize(fc.init_linear(KEY, 4, 3, dtype=jnp.complex64)),
        ValueError,
        "quantize: the weight of the layer is complex",
    ),
    "blocks that do not divide": (
        lambda: fc.quantize(LAYER, block_size=7),
        ValueError,
        "quantize: block_size=7 does not divide the 60 inputs of the layer",
    ),
    "block of zero": (
        lambda: fc.quantize(LAYER, block_size=0),
        ValueError,
        "quantize: block_size must be at least 1, got 0",
    ),
    "no layer chosen": (
        lambda: fc.quantize(NETWORK, select=lambda path: path == "tail"),
        ValueError,
        "quantize: found no layer to replace; the layers are 'body.0', 'body.1', 'head'",
    ),
    "select is no function": (
        lambda: fc.quantize(NETWORK, select="head"),
        TypeError,
        "quantize: select must be a function of a layer's path, got str",
    ),
    "nothing to materialize": (
        lambda: fc.materialize(NETWORK, select=lambda path: path == "tail"),
        ValueError,
        "materialize: found no layer",
    ),
    "normalized twice": (
        lambda: fc.weight_norm(fc.weight_norm(LAYER)),
        TypeError,
        "weight_norm: the weight of the layer is normalized already",
    ),
    "blocks that do not divide the outputs": (
        lambda: fc.block_diagonal(LAYER, num_blocks=5),
        ValueError,
        "block_diagonal: num_blocks=5 does not divide the 5 inputs and 7 outputs of the layer",
    ),
    "no blocks": (
        lambda: fc.block_diagonal(LAYER, num_blocks=0),
        ValueError,
        "block_diagonal: num_blocks must be at least 1",
    ),
    "magnitudes that do not fit": (
        lambda: fc.apply_linear(
            fc.LinearParams(fc.WeightNorm(FC.weight, jnp.ones(4)), None), jnp.ones(48)
        ),
        ValueError,
        r"apply_linear: expected the magnitude of WeightNorm to have the outputs \(5,\)",
    ),
    "a weight that is no array": (
        lambda: fc.apply_linear(fc.LinearParams(fc.Int8([1], 2.0), None), jnp.ones(48)),
        TypeError,
        "apply_linear: expected Int8.values to be an array, got list",
    ),
    "factors that do not fit": (
        lambda: fc.apply_linear(
            fc.LinearParams(fc.LowRank(jnp.ones((4, 2)), jnp.ones((3, 5))), None), jnp.ones(4)
        ),
        ValueError,
        r"apply_linear: expected down \(\*in, rank\) and up .* \(4, 2\) and \(3, 5\)",
    ),
    "an adapter that does not fit": (
        lambda: fc.apply_linear(
            fc.LinearParams(ADAPTED._replace(base=FC.weight.reshape(2, 4, 6, 5)), None),
            jnp.ones(48),
        ),
        ValueError,
        r"apply_linear: the adapter maps \(4, 3, 5\) to \(7,\), but its base maps \(2, 4, 6\)",
    ),
    "scales that do not fit": (
        lambda: fc.apply_linear(
            fc.LinearParams(INT8._replace(scale=jnp.ones((1, 4))), None), jnp.ones(48)
        ),
        ValueError,
        "apply_linear: expected Int8 with int8 values",
    ),
    "blocks torn apart": (
        lambda: fc.linear_to_conv(fc.quantize(FC, block_size=12), (4, 4), order="CHW"),
        ValueError,
        "linear_to_conv: the order of the inputs would break up the 4 blocks",
    ),
    "other layers": (
        lambda: fc.reconstruction_error(NETWORK, NETWORK["body"]),
        ValueError,
        "reconstruction_error: expected the same layers",
    ),
}
FC = fc.init_linear(KEY, 48, 5)
INT8 = fc.quantize(FC).weight
ADAPTED = fc.add_lora(KEY, LAYER, rank=2, alpha=2).weight

test_error = bad_calls(BAD)
