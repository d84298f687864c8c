"""Per-example gradients against `vmap(grad)`, jax_privacy and PyTorch's `torch.func`, in float32.

`python benchmarks/per_example.py` (the `peers` and `examples` extras). The candidates:

- fclayers: `per_example_norms`, `clipped_grad` and `gradient_gram`, jitted;
- batch gradient: `value_and_grad` of the mean loss, which knows no examples: what cannot be beaten;
- vmap(grad): every example's gradient, and what is asked for from them, jitted;
- jax_privacy: `clipped_grad`, by itself and in microbatches of 16 examples;
- torch: `torch.func.vmap(grad_and_value(loss))`, with the same weights;
- Jacobians: the Gram matrix as products of all gradients, by parameter, 500 examples at a time.

Before a case is timed, the candidates' results are compared. The targets: at least 8 in the column
of vmap(grad) for the MLP, 2 for the others, and 20 in that of Jacobians; at least 1 / 2.2 = 0.45 in
that of the batch gradient for the MLP. Temporaries are printed as well; their target is a twentieth
of vmap(grad)'s for the MLP, and no more for the others. The Gram matrix takes a minute per round:
`--only Gram --rounds 1`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import timing
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from jax import lax
from torch.utils import _pytree as torch_tree

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]

MAX_NORM = 1.0
MICROBATCH = 16
JACOBIANS = 500  # examples at a time: the largest layer's take 2 GB


class Network(NamedTuple):
    """The loss of one example, here and in PyTorch, and a batch of examples `(x, y)`."""

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    torch_loss: Callable[[Any, Any], torch.Tensor]
    batch: Any


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(count: int = 256) -> Network:
    def loss(params: Any, example: Any) -> jax.Array:
        x, y = example
        return cross_entropy(fc.apply_mlp(params, x), y)

    def torch_loss(params: Any, example: Any) -> torch.Tensor:
        x, y = example
        return F.cross_entropy(torch_mlp(params, x), y)

    params = fc.init_mlp(jax.random.key(0), [784, 1024, 1024, 10])
    return Network(params, loss, torch_loss, make_batch((count, 784), (count,), 10))


def conv() -> Network:
    """Three convolutions, two of them with a pool, and two layers, on 64 images of 32×32×3.

    They are XLA's own: under `vmap`, `apply_conv` picks its formulation for one image, which makes
    `vmap(grad)` slower.
    """

    def loss(params: Any, example: Any) -> jax.Array:
        convs, head = params
        x, y = example
        for i, layer in enumerate(convs):
            layout = "NHWC", "HWIO", "NHWC"
            x = lax.conv_general_dilated(
                x[None], layer.weight, (1, 1), "SAME", dimension_numbers=layout
            )[0]
            x = jax.nn.relu(x + layer.bias)
            if i < 2:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        return cross_entropy(fc.apply_mlp(head, x.reshape(-1)), y)

    def torch_loss(params: Any, example: Any) -> torch.Tensor:
        convs, head = params
        x, y = example
        x = x.movedim(-1, 0)[None]
        for i, layer in enumerate(convs):
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding="same"))
            x = F.max_pool2d(x, 2) if i < 2 else x
        return F.cross_entropy(torch_mlp(head, x.movedim(1, -1).reshape(-1)), y)

    keys = jax.random.split(jax.random.key(0), 4)
    widths = zip(keys, (3, 32, 64), (32, 64, 64), strict=False)
    convs = tuple(fc.init_conv(key, (3, 3), before, width) for key, before, width in widths)
    params = convs, fc.init_mlp(keys[3], [8 * 8 * 64, 128, 10])
    return Network(params, loss, torch_loss, make_batch((64, 32, 32, 3), (64,), 10))


class Block(NamedTuple):
    """A transformer's layer, of attention and an MLP, each with a norm before it."""

    norms: tuple[Any, Any]  # scale and shift
    attention: tuple[fc.LinearParams, fc.LinearParams]
    mlp: tuple[fc.LinearParams, ...]


def transformer() -> Network:
    """Two layers of width 128 with 4 heads on 64 positions, batch 32, which predict the inputs."""
    width, heads, positions = 128, 4, 64

    def normalize(params: Any, x: jax.Array) -> jax.Array:
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * params[0] + params[1]

    def loss(params: Any, example: Any) -> jax.Array:
        blocks, head = params
        x, y = example
        for block in blocks:
            mixed = fc.apply_linear(block.attention[0], normalize(block.norms[0], x))
            q, k, v = jnp.moveaxis(mixed.reshape(positions, 3, heads, -1), 1, 0)
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + fc.apply_linear(block.attention[1], attended.reshape(positions, width))
            x = x + fc.apply_mlp(block.mlp, normalize(block.norms[1], x), activation=jax.nn.gelu)
        return cross_entropy(fc.apply_linear(head, x), y)

    def torch_loss(params: Any, example: Any) -> torch.Tensor:
        blocks, head = params
        x, y = example
        for block in blocks:
            normal = F.layer_norm(x, (width,), *block.norms[0])
            mixed = F.linear(normal, *block.attention[0]).reshape(positions, 3, heads, -1)
            q, k, v = mixed.permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended = attended.transpose(0, 1).reshape(positions, width)
            x = x + F.linear(attended, *block.attention[1])
            normal = F.layer_norm(x, (width,), *block.norms[1])
            x = x + torch_mlp(block.mlp, normal, partial(F.gelu, approximate="tanh"))
        return F.cross_entropy(F.linear(x, *head), y)

    keys = iter(jax.random.split(jax.random.key(0), 9))
    norm = jnp.ones(width), jnp.zeros(width)
    blocks = tuple(
        Block(
            (norm, norm),
            (
                fc.init_linear(next(keys), width, 3 * width),
                fc.init_linear(next(keys), width, width),
            ),
            fc.init_mlp(next(keys), [width, 4 * width, width]),
        )
        for _ in range(2)
    )
    params = blocks, fc.init_linear(next(keys), width, width)
    batch = make_batch((32, positions, width), (32, positions), width)
    return Network(params, loss, torch_loss, batch)


def make_batch(x: tuple[int, ...], y: tuple[int, ...], classes: int, seed: int = 1) -> Any:
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], x), jax.random.randint(keys[1], y, 0, classes)


def torch_mlp(params: Any, x: torch.Tensor, activation: Any = F.relu) -> torch.Tensor:
    for layer in params[:-1]:
        x = activation(F.linear(x, *layer))
    return F.linear(x, *params[-1])


def to_torch(tree: Any) -> Any:
    """The same tree of tensors, with PyTorch's order of a weight's axes."""

    def layer(node: Any) -> Any:
        axes = (3, 2, 0, 1) if isinstance(node, fc.ConvParams) else (1, 0)
        weight = np.ascontiguousarray(np.transpose(node.weight, axes))
        return type(node)(tensor(weight), tensor(node.bias))

    def tensor(array: Any) -> torch.Tensor:
        array = torch.from_numpy(np.array(array))
        return array.long() if array.dtype == torch.int32 else array

    def is_layer(node: Any) -> bool:
        return isinstance(node, (fc.LinearParams, fc.ConvParams))

    return jax.tree.map(lambda n: layer(n) if is_layer(n) else tensor(n), tree, is_leaf=is_layer)


def norms(make: Callable[[], Network]) -> Candidates:
    network = make()

    def formed(params: Any, batch: Any) -> jax.Array:
        gradients = jax.vmap(jax.grad(network.loss), (None, 0))(params, batch)
        return jax.vmap(optax.tree.norm)(gradients)

    def torch_norms(params: Any, batch: Any) -> torch.Tensor:
        gradients = torch.func.vmap(torch.func.grad(network.torch_loss), (None, 0))(params, batch)
        return torch_global_norms(gradients)

    return candidates(
        network,
        {
            "fclayers": fc.per_example_norms(network.loss),
            "batch gradient": batch_gradient(network),
            "vmap(grad)": formed,
        },
        torch_norms,
    )


def clipped(make: Callable[[], Network]) -> Candidates:
    network = make()

    def formed(params: Any, batch: Any) -> Any:
        loss = jax.vmap(jax.value_and_grad(network.loss), (None, 0))
        losses, gradients = loss(params, batch)
        scales = 1 / jnp.maximum(jax.vmap(optax.tree.norm)(gradients) / MAX_NORM, 1)
        return losses, jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), gradients)

    def privacy(params: Any, batch: Any, size: int | None) -> Any:
        grad = jax_privacy.clipped_grad(
            network.loss,
            l2_clip_norm=MAX_NORM,
            keep_batch_dim=False,
            return_values=True,
            microbatch_size=size,
        )
        gradients, aux = grad(params, batch)
        return aux.values, gradients

    def torch_clipped(params: Any, batch: Any) -> Any:
        grad = torch.func.grad_and_value(network.torch_loss)
        gradients, losses = torch.func.vmap(grad, (None, 0))(params, batch)
        scales = 1 / (torch_global_norms(gradients) / MAX_NORM).clamp(min=1)
        sums = torch_tree.tree_map(lambda g: torch.tensordot(scales, g, 1), gradients)
        return losses, sums

    return candidates(
        network,
        {
            "fclayers": fc.clipped_grad(network.loss, MAX_NORM),
            "batch gradient": batch_gradient(network),
            "vmap(grad)": formed,
            "jax_privacy": partial(privacy, size=None),
            "jax_privacy by 16": partial(privacy, size=MICROBATCH),
        },
        torch_clipped,
    )


def gram() -> Candidates:
    """The inner products of the gradients of 1,000 examples and 1,000 others."""
    network, ours = mlp(1000), jax.jit(fc.gradient_gram(mlp().loss))
    others = make_batch((1000, 784), (1000,), 10, seed=2)
    leaves, structure = jax.tree.flatten(network.params)

    @partial(jax.jit, static_argnums=0)
    def block(leaf: int, leaves: list[jax.Array], one: Any, other: Any) -> jax.Array:
        def loss(own: jax.Array, example: Any) -> jax.Array:
            changed = [own if i == leaf else a for i, a in enumerate(leaves)]
            return network.loss(jax.tree.unflatten(structure, changed), example)

        jacobian = jax.vmap(jax.grad(loss), (None, 0))
        rows, columns = (jacobian(leaves[leaf], a).reshape(JACOBIANS, -1) for a in (one, other))
        return jax.lax.dot_general(rows, columns, (((1,), (1,)), ((), ())))

    def by_jacobians() -> np.ndarray:
        total = np.zeros((1000, 1000), np.float32)
        for leaf in range(len(leaves)):
            for i in range(0, 1000, JACOBIANS):
                for j in range(0, 1000, JACOBIANS):
                    parts = [
                        jax.tree.map(lambda a, k=k: a[k : k + JACOBIANS], batch)
                        for k, batch in ((i, network.batch), (j, others))
                    ]
                    found = block(leaf, leaves, *parts)
                    total[i : i + JACOBIANS, j : j + JACOBIANS] += np.asarray(found)
        return total

    call = partial(_ready, ours, network.params, network.batch, others)
    assert_close(call(), by_jacobians())
    return {"fclayers": call, "Jacobians": by_jacobians}


def candidates(
    network: Network, functions: Mapping[str, Callable[..., Any]], torch_function: Any
) -> Candidates:
    """Compiles, prints temporaries, compares results."""
    arguments = network.params, network.batch
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    for name, size in memory.items():
        ratio = size / memory["vmap(grad)"]
        print(f"{name}: {size / 1e6:.1f} MB of temporaries, {ratio:.4f} of vmap(grad)'s")
    calls = {name: partial(_ready, call, *arguments) for name, call in compiled.items()}
    torch_arguments = to_torch(network.params), to_torch(network.batch)
    calls["torch"] = partial(torch_function, *torch_arguments)

    expected = calls["fclayers"]()
    for name, call in calls.items():
        if name not in ("batch gradient", "torch"):
            assert_close(expected, call())
    found = calls["torch"]()
    if isinstance(found, tuple):
        assert_close(to_torch(expected[1]), found[1])
    else:
        assert_close(expected, found)
    return calls


def batch_gradient(network: Network) -> Callable[..., Any]:
    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jax.vmap(network.loss, (None, 0))(params, batch).mean()

    return jax.value_and_grad(mean_loss)


def torch_global_norms(gradients: Any) -> torch.Tensor:
    leaves = torch_tree.tree_leaves(gradients)
    return sum(leaf.flatten(1).square().sum(1) for leaf in leaves).sqrt()


def assert_close(ours: Any, theirs: Any) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(np.abs(np.asarray(one)).max())
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-4 * scale)


def _ready(function: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(function(*args))


NETWORKS = {
    "MLP 784-1024-1024-10, 256": mlp,
    "convolutions 32×32×3, 64": conv,
    "transformer 64 × 128, 32": transformer,
}
CASES: dict[str, Callable[[], Candidates]] = {
    f"{what} {name}": partial(function, make)
    for name, make in NETWORKS.items()
    for what, function in (("norms", norms), ("clipped", clipped))
} | {"Gram matrix 1000 × 1000": gram}

if __name__ == "__main__":
    timing.run(CASES, default_output="outputs/benchmarks/per_example.json")
