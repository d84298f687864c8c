"""Weights carried between live models of every framework and this library."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from interop_cases import CASES, FRAMEWORKS, fclayers_function, fclayers_result
from layers import peer_layer

import fclayers as fc

IMAGES = np.random.default_rng(0).standard_normal((3, 6, 5, 2)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_layer_computes_what_it_computes_there(framework, case):
    weights, y = peer_layer(framework, case)
    params = fclayers_function(framework, "from")(weights)
    np.testing.assert_allclose(fclayers_result(case, params), y, rtol=1e-5, atol=1e-5)
    exported = fclayers_function(framework, "to")(params)
    assert exported.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(exported[name], array)


def network(conv, *head, order="HWC"):
    """A 3×3 convolution, a flatten in the framework's order, and two fully connected layers."""
    x = jax.nn.relu(fc.apply_conv(conv, IMAGES))
    x = x if order == "HWC" else jnp.moveaxis(x, -1, 1)
    return fc.apply_mlp(head, x.reshape(len(x), -1))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_torch_model():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )
    images = torch.tensor(IMAGES).movedim(-1, 1)
    layers = fc.interop.from_torch(model.state_dict(), flattened=(4, 4, 3))
    assert_close(network(*layers.values()), model(images).detach())
    back = fc.interop.to_torch(jax.tree.map(lambda x: 2 * x, layers), flattened=(4, 4, 3))
    expected = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


@given(st.tuples(*[st.integers(1, 4)] * 3), st.booleans())
def test_torch_bilinear(sizes, bias):
    layer = torch.nn.Bilinear(*sizes, bias=bias)
    x1, x2 = torch.randn(5, sizes[0]), torch.randn(5, sizes[1])
    params = fc.interop.from_torch(layer.state_dict(), bilinear=True)
    assert_close(fc.apply_bilinear(params, x1.numpy(), x2.numpy()), layer(x1, x2).detach())


@given(st.tuples(*[st.integers(1, 5)] * 4))
def test_a_layer_behind_torchs_flatten(sizes):
    channels, height, width, outputs = sizes
    layer = torch.nn.Linear(channels * height * width, outputs)
    maps = torch.randn(2, channels, height, width)
    params = fc.interop.from_torch(layer.state_dict(), flattened=(channels, height, width))
    scores = fc.apply_conv(fc.linear_to_conv(params, (height, width)), maps.movedim(1, -1).numpy())
    np.testing.assert_allclose(scores[:, 0, 0], layer(maps.flatten(1)).detach(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_dtypes(dtype):
    layer = torch.nn.Linear(3, 4, dtype=dtype)
    with jax.enable_x64(dtype == torch.float64):
        params = fc.interop.from_torch(dict(layer.named_parameters()))
        assert str(params.weight.dtype) == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(
            np.asarray(params.weight, np.float64), layer.weight.detach().double().T
        )
    with torch.no_grad():
        layer.bias.fill_(7)
    assert not (np.asarray(params.bias) == 7).any()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x))
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


def test_linen_model():
    y, variables = Linen().init_with_output(jax.random.key(0), IMAGES)
    layers = fc.interop.from_flax(variables["params"])
    assert_close(network(layers["Conv_0"], layers["Dense_0"], layers["Dense_1"]), y)
    back = fc.interop.to_flax(layers)
    assert jax.tree.structure(back) == jax.tree.structure(variables["params"])
    np.testing.assert_array_equal(Linen().apply({"params": back}, IMAGES), y)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.head = nnx.List([nnx.Linear(48, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return self.head[1](nnx.relu(self.head[0](x.reshape(len(x), -1))))


@pytest.mark.parametrize("pure", [True, False])
def test_nnx_model(pure):
    model = Nnx(nnx.Rngs(0))
    y = model(jnp.asarray(IMAGES))
    graph, state = nnx.split(model)
    layers = fc.interop.from_flax(nnx.to_pure_dict(state) if pure else state)
    assert_close(network(layers["conv"], layers["head"][0], layers["head"][1]), y)
    empty = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(empty, fc.interop.to_flax(layers))
    np.testing.assert_array_equal(nnx.merge(graph, empty)(jnp.asarray(IMAGES)), y)


def test_haiku_model():
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(4, 3, padding="VALID")(x))
        return hk.nets.MLP([8, 3])(hk.Flatten()(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), IMAGES)
    layers = fc.interop.from_haiku(params)
    head = layers["mlp/~/linear_0"], layers["mlp/~/linear_1"]
    assert_close(network(layers["conv2_d"], *head), model.apply(params, IMAGES))
    np.testing.assert_array_equal(
        model.apply(fc.interop.to_haiku(layers), IMAGES), model.apply(params, IMAGES)
    )


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __call__(self, x):
        return self.mlp(jax.nn.relu(self.conv(jnp.moveaxis(x, -1, 0))).ravel())


def test_equinox_model():
    keys = jax.random.split(jax.random.key(0))
    model = Equinox(eqx.nn.Conv2d(2, 4, 3, key=keys[0]), eqx.nn.MLP(48, 3, 8, 1, key=keys[1]))
    y = jax.vmap(model)(IMAGES)
    layers = fc.interop.from_equinox(model)
    head = layers["mlp"]["layers"].values()
    assert_close(network(layers["conv"], *head, order="CHW"), y)
    arrays, rest = eqx.partition(model, eqx.is_array)
    back = fc.interop.to_equinox(layers)
    leaves = [back["conv"]["weight"], back["conv"]["bias"]]
    leaves += [back["mlp"]["layers"][i][part] for i in (0, 1) for part in ("weight", "bias")]
    restored = eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)
    np.testing.assert_array_equal(jax.vmap(restored)(IMAGES), y)


def test_keras_model():
    model = keras.Sequential(
        [
            keras.Input((6, 5, 2)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(3),
        ]
    )
    weights = {variable.path: variable for variable in model.variables}
    (layers,) = fc.interop.from_keras(weights).values()
    assert_close(network(*layers.values()), model(IMAGES))
    back = fc.interop.to_keras(fc.interop.from_keras(weights))
    assert back.keys() == weights.keys()
    for variable in model.variables:
        np.testing.assert_array_equal(back[variable.path], variable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_files_are_pytorchs(tmp_path, dtype):
    mlp = fc.init_mlp(jax.random.key(0), [3, 4, 2], dtype=dtype)
    fc.interop.save_safetensors(tmp_path / "ours", mlp)
    tensors = safetensors.torch.load_file(tmp_path / "ours")
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        layer, part = mlp[int(name[0])], name[2:]
        assert str(tensors[name].dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(
            tensors[name].float(), np.asarray(getattr(layer, part), np.float32)
        )
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    loaded = fc.interop.load_safetensors(tmp_path / "theirs", mlp)
    for ours, theirs in zip(jax.tree.leaves(mlp), jax.tree.leaves(loaded), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_torch_checkpoint_in_safetensors(tmp_path):
    layer = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer")
    params = fc.interop.from_torch(fc.interop.load_safetensors(tmp_path / "layer"))
    np.testing.assert_array_equal(
        np.asarray(params.weight, np.float32), layer.weight.float().T.detach()
    )
