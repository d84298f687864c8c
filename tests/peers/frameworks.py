"""The parity cases run by the other frameworks, each in its documented way."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from parity import Arrays, Case


def torch_results(case: Case) -> Arrays:
    arrays = {
        name: torch.tensor(array, requires_grad=name != "cotangent")
        for name, array in case.arrays.items()
    }
    if case.kind == "bilinear":
        y = torch.nn.functional.bilinear(
            arrays["x1"], arrays["x2"], arrays["weight"], arrays["bias"]
        )
    else:
        y = torch.nn.functional.linear(arrays["x"], arrays["weight"], arrays.get("bias"))
    y.backward(arrays.pop("cotangent"))
    gradients = {f"d_{name}": array.grad.numpy() for name, array in arrays.items()}
    return {"y": y.detach().numpy()} | gradients


def linen_results(case: Case) -> Arrays:
    def apply(arrays):
        dense = nn.Dense(arrays["weight"].shape[0], use_bias="bias" in arrays)
        params = {"kernel": arrays["weight"].T}
        params |= {"bias": arrays["bias"]} if "bias" in arrays else {}
        return dense.apply({"params": params}, arrays["x"])

    return _results(apply, case)


def nnx_results(case: Case) -> Arrays:
    out_features, in_features = case.arrays["weight"].shape
    layer = nnx.Linear(in_features, out_features, use_bias="bias" in case.arrays, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def apply(arrays):
        params = {"kernel": arrays["weight"].T}
        params |= {"bias": arrays["bias"]} if "bias" in arrays else {}
        new_state = jax.tree.map(lambda _: None, state)
        nnx.replace_by_pure_dict(new_state, params)
        return nnx.merge(graph, new_state)(arrays["x"])

    return _results(apply, case)


def equinox_results(case: Case) -> Arrays:
    out_features, in_features = case.arrays["weight"].shape
    bias = "bias" in case.arrays
    layer = eqx.nn.Linear(in_features, out_features, use_bias=bias, key=jax.random.key(0))

    def apply(arrays):
        new = eqx.tree_at(lambda m: m.weight, layer, arrays["weight"])
        if bias:
            new = eqx.tree_at(lambda m: m.bias, new, arrays["bias"])
        x = arrays["x"]
        return jax.vmap(new)(x.reshape(-1, in_features)).reshape(*x.shape[:-1], out_features)

    return _results(apply, case)


def haiku_results(case: Case) -> Arrays:
    def apply(arrays):
        out_features = arrays["weight"].shape[0]
        layer = hk.without_apply_rng(
            hk.transform(lambda x: hk.Linear(out_features, with_bias="bias" in arrays)(x))
        )
        params = {"w": arrays["weight"].T}
        params |= {"b": arrays["bias"]} if "bias" in arrays else {}
        return layer.apply({"linear": params}, arrays["x"])

    return _results(apply, case)


def _results(apply, case: Case) -> Arrays:
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    cotangent = arrays.pop("cotangent")
    y, pullback = jax.vjp(apply, arrays)
    (gradients,) = pullback(cotangent)
    return {"y": np.asarray(y)} | {f"d_{name}": np.asarray(g) for name, g in gradients.items()}


def torch_losses(case):
    """PyTorch's `cross_entropy` on all the logits, as `fclayers_losses` gives it."""
    arrays = case.arrays()
    labels = torch.tensor(arrays.pop("labels"))
    weight, bias, x = (torch.tensor(array, requires_grad=True) for array in arrays.values())
    loss = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(x, weight, bias),
        labels,
        label_smoothing=case.smoothing,
        reduction=case.reduction,
    )
    loss.sum().backward()
    results = {"loss": loss, "weight's gradient": weight.grad, "bias's gradient": bias.grad}
    results["x's gradient"] = x.grad
    return {name: tensor.detach().numpy() for name, tensor in results.items()}
