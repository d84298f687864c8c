"""Weights from and to every framework, by arrays that the frameworks wrote, and by property."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import bad_calls
from hypothesis import given
from hypothesis import strategies as st
from interop_cases import CASES, FRAMEWORKS, fclayers_function, fclayers_result

import fclayers as fc

GOLDEN = np.load(Path(__file__).parent / "golden" / "interop.npz")
NAMES = ("torch", "flax", "haiku", "equinox", "keras")


def stored_weights(framework, case):
    prefix = f"{framework}/{case.name}/weights/"
    return {n.removeprefix(prefix): GOLDEN[n] for n in GOLDEN if n.startswith(prefix)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_layer_computes_what_it_computed_there(framework, case):
    weights = stored_weights(framework, case)
    params = fclayers_function(framework, "from")(weights)
    expected = GOLDEN[f"{framework}/{case.name}/y"]
    np.testing.assert_allclose(fclayers_result(case, params), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(fclayers_function(framework, "to")(params), weights)


@st.composite
def trees(draw):
    """A dict of layers and of dicts and tuples of layers, in some dtype."""
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def layer():
        kernel = draw(st.lists(st.integers(1, 3), max_size=3))
        kind = fc.ConvParams if kernel else fc.LinearParams
        weight = jnp.array(rng.standard_normal((*kernel, draw(st.integers(1, 4)), 5)), dtype)
        bias = jnp.array(rng.standard_normal(5), dtype) if draw(st.booleans()) else None
        return kind(weight, bias)

    return {"stem": layer(), "body": {"first": layer(), "second": {"third": layer()}}}


@given(trees())
@pytest.mark.parametrize("framework", NAMES)
def test_export_and_import_give_the_same_bits(framework, tree):
    exported = fclayers_function(framework, "to")(tree)
    imported = fclayers_function(framework, "from")(exported)
    if framework == "haiku":
        assert sorted(imported) == ["body/first", "body/second/third", "stem"]
        first, third = imported["body/first"], imported["body/second/third"]
        imported = {"stem": imported["stem"], "body": {"first": first, "second": {"third": third}}}
    chex.assert_trees_all_equal(imported, tree)
    chex.assert_trees_all_equal_dtypes(imported, tree)


@given(st.tuples(*[st.integers(1, 4)] * 4), st.booleans())
def test_a_layer_behind_torchs_flatten_takes_channels_last(sizes, bias):
    channels, height, width, outputs = sizes
    rng = np.random.default_rng(0)
    state_dict = {"fc.weight": rng.standard_normal((outputs, channels * height * width))}
    state_dict |= {"fc.bias": rng.standard_normal(outputs)} if bias else {}
    state_dict = {name: array.astype(np.float32) for name, array in state_dict.items()}
    flattened = (channels, height, width)
    params = fc.interop.from_torch(state_dict, "fc", flattened=flattened)
    maps = rng.standard_normal((2, channels, height, width)).astype(np.float32)
    channels_last = np.moveaxis(maps, 1, -1)
    expected = maps.reshape(2, -1) @ state_dict["fc.weight"].T + state_dict.get("fc.bias", 0)
    y = fc.apply_linear(params, channels_last.reshape(2, -1))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    score = fc.apply_conv(fc.linear_to_conv(params, (height, width)), channels_last)
    np.testing.assert_allclose(score[:, 0, 0], expected, rtol=1e-5, atol=1e-5)
    on_axes = params._replace(weight=params.weight.reshape(height, width, channels, outputs))
    for layer in (params, on_axes):
        chex.assert_trees_all_equal(
            fc.interop.to_torch(layer, "fc", flattened=flattened), state_dict
        )


def test_a_whole_model_is_nested_as_its_names():
    state_dict = {
        "features.0.weight": np.ones((4, 3, 2, 2), np.float32),
        "features.0.bias": np.ones(4, np.float32),
        "features.3.weight": np.ones((5, 4, 2, 2), np.float32),
        "classifier.weight": np.arange(40, dtype=np.float32).reshape(2, 20),
    }
    model = fc.interop.from_torch(state_dict, flattened=(5, 2, 2))
    chex.assert_trees_all_equal(model["features"], fc.interop.from_torch(state_dict, "features"))
    assert model["features"]["3"].bias is None
    assert isinstance(model["classifier"], fc.LinearParams)
    reordered = np.arange(40).reshape(2, 5, 2, 2).transpose(2, 3, 1, 0).reshape(20, 2)
    np.testing.assert_array_equal(model["classifier"].weight, reordered)
    chex.assert_trees_all_equal(fc.interop.to_torch(model, flattened=(5, 2, 2)), state_dict)


def test_a_bilinear_layer_is_told_by_its_argument():
    state_dict = {"weight": np.arange(24, dtype=np.float32).reshape(4, 2, 3), "bias": np.ones(4)}
    params = fc.interop.from_torch(state_dict, bilinear=True)
    x1, x2 = np.ones((5, 2)), np.full((5, 3), 2.0)
    expected = np.einsum("bi,kij,bj->bk", x1, state_dict["weight"], x2) + 1
    np.testing.assert_allclose(fc.apply_bilinear(params, x1, x2), expected, rtol=1e-6)
    chex.assert_trees_all_equal(fc.interop.to_torch(params), state_dict)
    assert isinstance(fc.interop.from_torch(state_dict), fc.ConvParams)


def test_layers_in_tuples_are_numbered():
    mlp = fc.init_mlp(jax.random.key(0), [3, 4, 2])
    assert list(fc.interop.to_torch(mlp, "head")) == [
        "head.0.weight",
        "head.0.bias",
        "head.1.weight",
        "head.1.bias",
    ]
    assert sorted(fc.interop.to_flax({"layers": mlp})["layers"]) == [0, 1]
    chex.assert_trees_all_equal(
        fc.interop.from_equinox({"layers": fc.interop.to_equinox(mlp)})["layers"][1], mlp[1]
    )


def test_imported_arrays_are_copies():
    kernel, bias = np.zeros((256, 256), np.float32), np.zeros(256, np.float32)
    layer = fc.interop.from_flax({"kernel": kernel, "bias": bias})
    kernel[:], bias[:] = 1, 1
    assert not layer.weight.any()
    assert not layer.bias.any()


LAYER = fc.init_linear(jax.random.key(0), 4, 3)
WEIGHT, BIAS = np.ones((3, 4), np.float32), np.ones(3, np.float32)
BAD = {
    "all problems at once": (
        lambda: fc.interop.from_torch(
            {
                "a.bias": BIAS,
                "b.weight": WEIGHT,
                "b.bias": np.ones(4),
                "c.weight": BIAS,
                "c.running_mean": BIAS,
                "d.weight": WEIGHT,
            }
        ),
        ValueError,
        r"(?s)from_torch: nothing was loaded, because of\s+missing: a\.weight\s+"
        r"b\.bias has shape \(4,\), which does not belong to b\.weight of shape \(3, 4\)\s+"
        r"extra: c\.running_mean, beside .*c\.weight has shape \(3,\)",
    ),
    "integers": (
        lambda: fc.interop.from_torch({"weight": np.ones((3, 4), int)}),
        ValueError,
        "weight has shape .* and dtype int",
    ),
    "no array": (
        lambda: fc.interop.from_flax({"kernel": WEIGHT, "bias": "zeros"}),
        ValueError,
        "from_flax: .*\n  bias is 'zeros' of type str, expected an array",
    ),
    "a layer inside a layer": (
        lambda: fc.interop.from_flax({"kernel": WEIGHT, "Dense_0": {"kernel": WEIGHT}}),
        ValueError,
        "extra: Dense_0, beside",
    ),
    "an array inside an array": (
        lambda: fc.interop.from_torch({"a.weight": WEIGHT, "a": WEIGHT}),
        ValueError,
        "from_torch: a and another entry are one inside the other",
    ),
    "an array around an array": (
        lambda: fc.interop.from_keras({"a": WEIGHT, "a/kernel": WEIGHT}),
        ValueError,
        "from_keras: a.kernel and another entry are one inside the other",
    ),
    "no such prefix": (
        lambda: fc.interop.from_torch({"fc1.weight": WEIGHT}, "fc"),
        ValueError,
        r"from_torch: no entry starts with 'fc\.'; the entries are fc1\.weight",
    ),
    "a module": (
        lambda: fc.interop.from_torch(LAYER),
        TypeError,
        r"from_torch: expected a mapping of names to arrays such as model\.state_dict\(\), got Lin",
    ),
    "a list": (
        lambda: fc.interop.from_keras([WEIGHT, BIAS]),
        TypeError,
        "from_keras: expected a mapping of paths to arrays, got list",
    ),
    "an array for params": (
        lambda: fc.interop.from_flax(WEIGHT),
        TypeError,
        r"from_flax: expected a mapping .* got an array of shape \(3, 4\)",
    ),
    "a module without arrays": (
        lambda: fc.interop.from_equinox({"activation": len}),
        TypeError,
        "from_equinox: expected a module with layers, got dict",
    ),
    "no layer follows the flatten": (
        lambda: fc.interop.from_torch({"weight": WEIGHT}, flattened=(5, 2, 2)),
        ValueError,
        r"from_torch: flattened=\(5, 2, 2\) is for one .* of 20 inputs, but 0 have as many",
    ),
    "two layers could follow the flatten": (
        lambda: fc.interop.to_torch((LAYER, LAYER), flattened=(1, 2, 2)),
        ValueError,
        r"to_torch: flattened=\(1, 2, 2\) .* but 2 have as many",
    ),
    "features on axes": (
        lambda: fc.interop.to_torch(fc.init_linear(jax.random.key(0), (2, 2, 3), 4)),
        ValueError,
        r"to_torch: PyTorch has no layer with a weight of shape \(2, 2, 3, 4\); pass flattened",
    ),
    "no layer to export": (
        lambda: fc.interop.to_haiku({"a": LAYER, "b": WEIGHT}),
        TypeError,
        r"to_haiku: expected a tree of layers .*, got an array .* at b",
    ),
}


test_error = bad_calls(BAD)
