"""The layers of `interop_cases` in the other frameworks: their arrays, and what they compute."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx
from interop_cases import LayerCase

Weights = dict[str, np.ndarray]


def peer_layer(framework: str, case: LayerCase) -> tuple[Weights, np.ndarray]:
    """The layer's arrays under the framework's names, random biases included, and its output."""
    weights, y = globals()[f"_{framework}"](case)
    return {name: np.asarray(array) for name, array in weights.items()}, np.asarray(y)


def _torch(case: LayerCase) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = (case.in_features, case.out_features)
    if not case.kernel:
        layer = torch.nn.Linear(*sizes, bias=case.bias)
        y = layer(torch.tensor(case.x))
    else:
        conv = getattr(torch.nn, f"Conv{len(case.kernel)}d")
        layer = conv(*sizes, case.kernel, groups=case.groups, bias=case.bias)
        y = layer(torch.tensor(case.x).movedim(-1, 1)).movedim(1, -1)
    return layer.state_dict(), y.detach()


def _linen(case: LayerCase) -> tuple[Any, Any]:
    options = {"use_bias": case.bias, "bias_init": nn.initializers.normal()}
    if not case.kernel:
        layer = nn.Dense(case.out_features, **options)
    else:
        layer = nn.Conv(
            case.out_features,
            case.kernel,
            padding="VALID",
            feature_group_count=case.groups,
            **options,
        )
    y, variables = layer.init_with_output(jax.random.key(0), case.x)
    return variables["params"], y


def _nnx(case: LayerCase) -> tuple[Any, Any]:
    options = {"use_bias": case.bias, "bias_init": nn.initializers.normal(), "rngs": nnx.Rngs(0)}
    sizes = (case.in_features, case.out_features)
    if not case.kernel:
        layer = nnx.Linear(*sizes, **options)
    else:
        layer = nnx.Conv(
            *sizes, case.kernel, padding="VALID", feature_group_count=case.groups, **options
        )
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param)), layer(jnp.asarray(case.x))


def _haiku(case: LayerCase) -> tuple[Any, Any]:
    options = {"with_bias": case.bias, "b_init": hk.initializers.RandomNormal()}

    def layer(x):
        if not case.kernel:
            return hk.Linear(case.out_features, name="layer", **options)(x)
        return hk.ConvND(
            len(case.kernel),
            case.out_features,
            case.kernel,
            padding="VALID",
            feature_group_count=case.groups,
            name="layer",
            **options,
        )(x)

    transformed = hk.without_apply_rng(hk.transform(layer))
    params = transformed.init(jax.random.key(0), case.x)
    return params["layer"], transformed.apply(params, case.x)


def _equinox(case: LayerCase) -> tuple[Any, Any]:
    sizes, key = (case.in_features, case.out_features), jax.random.key(0)
    if not case.kernel:
        layer = eqx.nn.Linear(*sizes, use_bias=case.bias, key=key)
        y = jax.vmap(layer)(case.x)
    else:
        layer = eqx.nn.Conv(
            len(case.kernel),
            *sizes,
            case.kernel,
            groups=case.groups,
            use_bias=case.bias,
            key=key,
        )
        y = jnp.moveaxis(jax.vmap(layer)(jnp.moveaxis(case.x, -1, 1)), 1, -1)
    weights = {"weight": layer.weight} | ({"bias": layer.bias} if case.bias else {})
    return weights, y


def _keras(case: LayerCase) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    options = {"use_bias": case.bias, "bias_initializer": "random_normal"}
    if not case.kernel:
        layer = keras.layers.Dense(case.out_features, **options)
    else:
        conv = getattr(keras.layers, f"Conv{len(case.kernel)}D")
        layer = conv(case.out_features, case.kernel, groups=case.groups, **options)
    y = layer(case.x)
    return {v.name: np.asarray(v) for v in layer.variables}, y
