"""Gradients of examples live against optax, PyTorch and jax_privacy, and for real models."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import fclayers as fc


def assert_close(ours, theirs, rtol=1e-9):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        other = np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


class Network(NamedTuple):
    """A loss of one example `(x, y)` here and in PyTorch, float64 parameters, and a batch."""

    loss: Callable[..., Any]
    torch_loss: Callable[..., Any]
    params: Any
    batch: Any
    max_norm: float  # which some examples exceed


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def mlp():
    def loss(params, example):
        return cross_entropy(fc.apply_mlp(params, example[0]), example[1])

    def torch_loss(params, example):
        x = example[0]
        for weight, bias in params[:-1]:
            x = torch.relu(x @ weight + bias)
        weight, bias = params[-1]
        return torch.nn.functional.cross_entropy(x @ weight + bias, example[1])

    params = fc.init_mlp(jax.random.key(0), [5, 9, 8, 4], dtype=jnp.float64)
    return Network(loss, torch_loss, params, batch_of((5,)), 1.1)


def convolutions():
    def loss(params, example):
        conv, head = params
        x = jax.nn.relu(fc.apply_conv(conv, example[0], stride=2, groups=2, padding=((1, 1),) * 2))
        return cross_entropy(fc.apply_linear(head, x, axis=(0, 1, 2)), example[1])

    def torch_loss(params, example):
        conv, head = params
        x, weight = example[0].permute(2, 0, 1)[None], conv[0].permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, weight, conv[1], stride=2, groups=2, padding=1)
        x = torch.relu(x)[0].permute(1, 2, 0)
        logits = torch.tensordot(x, head[0], 3) + head[1]
        return torch.nn.functional.cross_entropy(logits, example[1])

    keys = jax.random.split(jax.random.key(0))
    params = (
        fc.init_conv(keys[0], (3, 3), 4, 6, groups=2, dtype=jnp.float64),
        fc.init_linear(keys[1], (4, 3, 6), 4, dtype=jnp.float64),
    )
    return Network(loss, torch_loss, params, batch_of((7, 6, 4)), 3.1)


def attention():
    """One head over six positions, with a norm before it; the weight of q, k, v is one."""

    def loss(params, example):
        (scale, mixed), head = params
        x = example[0]
        x = scale * (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        q, k, v = jnp.split(x @ mixed, 3, axis=-1)
        x = jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5) @ v
        return cross_entropy(x.mean(0) @ head, example[1])

    def torch_loss(params, example):
        (scale, mixed), head = params
        x = scale * torch.nn.functional.layer_norm(example[0], (5,))
        q, k, v = (x @ mixed).chunk(3, -1)
        x = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return torch.nn.functional.cross_entropy(x.mean(0) @ head, example[1])

    rng = np.random.default_rng(0)
    params = (
        (jnp.asarray(rng.uniform(0.5, 2, 5)), jnp.asarray(rng.normal(size=(5, 12)))),
        jnp.asarray(rng.normal(size=(4, 4))),
    )
    return Network(loss, torch_loss, params, batch_of((6, 5)), 7.0)


def batch_of(shape, count=11):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(count, *shape))), jnp.asarray(rng.integers(4, size=count))


NETWORKS = (mlp, convolutions, attention)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


@pytest.mark.parametrize("make", NETWORKS)
def test_clipped_sums_are_optaxs(make):
    network = make()
    gradients = jax.jit(jax.vmap(jax.grad(network.loss), (None, 0)))(*network[2:4])
    aggregate = optax.contrib.differentially_private_aggregate(
        network.max_norm, 0.0, jax.random.key(0)
    )
    expected, _ = aggregate.update(gradients, aggregate.init(network.params))
    ours = jax.jit(fc.clipped_grad(network.loss, network.max_norm, reduction="mean"))
    _, mean = ours(*network[2:4])
    assert_close(mean, expected)


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", NETWORKS)
def test_clipped_sums_are_jax_privacys(make):
    network = make()
    theirs = jax_privacy.clipped_grad(
        network.loss,
        l2_clip_norm=network.max_norm,
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
    )
    expected, aux = jax.jit(theirs)(*network[2:4])
    losses, total = jax.jit(fc.clipped_grad(network.loss, network.max_norm))(*network[2:4])
    assert_close((losses, total), (aux.values, expected))
    norms = jax.jit(fc.per_example_norms(network.loss))(*network[2:4])
    assert_close(norms, aux.grad_norms, rtol=1e-6)  # jax_privacy returns float32


@pytest.mark.parametrize("make", NETWORKS)
def test_results_are_torchs(make):
    """As Opacus defines them: every sample's gradient, its norm, the sum of clipped ones."""
    network = make()
    params, batch = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), network[2:4])
    grad = torch.func.grad_and_value(network.torch_loss)
    gradients, losses = torch.func.vmap(grad, (None, 0))(params, batch)
    flat = torch.cat([g.flatten(1) for g in jax.tree.leaves(gradients)], dim=1)
    norms = flat.norm(dim=1)
    scales = (network.max_norm / norms).clamp(max=1)
    assert 0 < (scales < 1).sum() < len(scales)
    sums = jax.tree.map(lambda g: torch.tensordot(scales, g, 1), gradients)

    assert_close(jax.jit(fc.per_example_norms(network.loss))(*network[2:4]), norms)
    clipped = jax.jit(fc.clipped_grad(network.loss, network.max_norm))
    assert_close(clipped(*network[2:4]), (losses, sums))
    assert_close(jax.jit(fc.gradient_gram(network.loss))(*network[2:4]), flat @ flat.T)


class Model(NamedTuple):
    """A classifier in the idiom of a framework: logits of one image `(8, 8, 3)`."""

    apply: Callable[..., Any]
    params: Any


def linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(6, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(16, 6)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return nn.Dense(4)(nn.relu(nn.Dense(7)(x.reshape(-1))))

    model = Network()
    return Model(model.apply, model.init(jax.random.key(0), jnp.ones((8, 8, 3))))


def flax_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.head = nnx.Linear(96, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x))).reshape(16, 6)
            return self.head((x + self.attention(x)).reshape(-1))

    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
    return Model(lambda params, x: nnx.merge(graph, params, rest)(x), params)


def equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 6, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 6),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(96, 4, 7, 2, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Model(lambda params, x: eqx.combine(params, static)(x.transpose(2, 0, 1)), params)


def haiku():
    def network(x):
        x = hk.Conv2D(6, 3, stride=2)(x)
        x = jax.nn.relu(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)).reshape(16, 6)
        x, _ = hk.dynamic_unroll(hk.GRU(5), x, jnp.zeros(5))
        return hk.nets.MLP([7, 4])(x.reshape(-1))

    model = hk.without_apply_rng(hk.transform(network))
    return Model(model.apply, model.init(jax.random.key(0), jnp.ones((8, 8, 3))))


@pytest.mark.parametrize("make", [linen, flax_nnx, equinox, haiku])
def test_a_model_of_a_framework(make):
    model = make()
    params = jax.tree.map(lambda a: a.astype(jnp.float64), model.params)
    batch, others = batch_of((8, 8, 3), 6), jax.tree.map(lambda a: a[:4], batch_of((8, 8, 3)))

    def loss(params, example):
        return cross_entropy(model.apply(params, example[0]), example[1])

    def gradients(params, batch):
        grads = jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, batch))
        return jnp.concatenate([g.reshape(len(g), -1) for g in grads], axis=1)

    ours, theirs = jax.jit(gradients)(params, batch), jax.jit(gradients)(params, others)
    norms = jnp.linalg.norm(ours, axis=1)
    assert_close(jax.jit(fc.per_example_norms(loss))(params, batch), norms)

    limit = jnp.median(norms)  # so that some are clipped and some are not
    losses, sums = jax.jit(fc.clipped_grad(loss, limit))(params, batch)
    assert jax.tree.structure(sums) == jax.tree.structure(params)
    flat = jnp.concatenate([a.ravel() for a in jax.tree.leaves(sums)])
    assert_close(flat, jnp.minimum(1, limit / norms) @ ours)
    assert_close(losses, jax.jit(jax.vmap(loss, (None, 0)))(params, batch))

    assert_close(jax.jit(fc.gradient_gram(loss))(params, batch, others), ours @ theirs.T)
    report = fc.explain_per_example(loss)(params, batch)
    assert not report.falls_back, report


@pytest.mark.parametrize(("steps", "noise_multiplier"), [(1, 10.0), (100, 10.0), (20, 4.0)])
def test_the_examples_privacy_is_dp_accountings(steps, noise_multiplier, monkeypatch):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    example = runpy.run_path(str(examples / "which_digits_are_hard.py"))
    sys.modules.pop("common", None)
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(noise_multiplier), steps)
    expected = accountant.get_epsilon(example["DELTA"])
    assert example["epsilon"](steps, noise_multiplier) == pytest.approx(expected, rel=1e-5)
