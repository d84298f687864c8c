"""Sums of the examples' gradients, each of them clipped, with noise."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fclayers._util.checks import check_key, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers.per_example.capture import linear_in_parameter
from fclayers.per_example.gradients import Gradients, find_gradients, pull_back_of
from fclayers.per_example.groups import Group, keep_for_sums
from fclayers.per_example.meshes import on_any_mesh, specs_like
from fclayers.per_example.norms import squared_norms, total_of
from fclayers.per_example.problem import Fun, pose


@public
def clipped_grad(
    loss: Fun,
    max_norm: ArrayLike,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    noise_multiplier: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Callable[..., tuple[Float[Array, "n"], PyTree[Array]]]:
    """Makes a function that returns the losses and the sum of the examples' clipped gradients.

    The gradient `g` of each example is divided by `max(norm(g) / max_norm, 1)`, with its norm over
    all parameters together. No example's gradient is stored, as in `per_example_norms`; the sum
    takes the same products as the gradient of an ordinary batch.

    Args:
        loss: A function `loss(params, example)` of one example that returns a real scalar.
        max_norm: The largest norm, a positive number, or infinity.
        reduction: `"sum"`, or `"mean"`: the sum divided by the number of examples.
        noise_multiplier: The standard deviation of the Gaussian noise that is added to every number
            of the sum, in units of `max_norm`. It makes a step differentially private; the privacy
            that steps cost together is for `dp-accounting` or others to count.
        key: The random key of the noise, a fresh one for each step: make the function inside the
            jitted step that gets the key, as in the example.

    Returns:
        A function `clipped(params, batch)` that returns the losses `(N,)` and gradients with the
        structure, shapes and dtypes of `params`; those of integers are zero. It can be jitted and
        sharded over the batch.

    Raises:
        TypeError: As `per_example_norms`, or `key` is not a random key.
        ValueError: As `per_example_norms`, or an argument is out of range, or there is noise and no
            key, or a key and no noise.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 3, 2)
        >>> def loss(params, example):
        ...     x, y = example
        ...     return jnp.sum((fc.apply_linear(params, x) - y) ** 2)
        >>> batch = jnp.ones((8, 3)), jnp.ones((8, 2))
        >>> @jax.jit
        ... def private(params, batch, key):
        ...     clipped = fc.clipped_grad(loss, 1.0, noise_multiplier=1.1, key=key)
        ...     return clipped(params, batch)
        >>> losses, grads = private(params, batch, jax.random.key(1))
        >>> losses.shape, grads.weight.shape
        ((8,), (3, 2))

    Source: `Abadi et al. 2016 <https://arxiv.org/abs/1607.00133>`_.
    """
    _check(max_norm, reduction, noise_multiplier, key)

    def clipped(params: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> tuple[Array, PyTree]:
        problem, arrays = pose(loss, params, batch, scalar=True)
        gradients = find_gradients(problem, arrays, keep_for_sums)
        norms = jnp.sqrt(total_of(gradients, squared_norms(gradients)))
        sums = weighted_sum(gradients, 1 / jnp.maximum(norms / max_norm, 1))
        if key is not None:
            sums = _add_noise(sums, key, noise_multiplier * max_norm)
        if reduction == "mean":
            sums = [a if _is_integer(a) else a / gradients.size for a in sums]
        return gradients.captured.outs, jax.tree.unflatten(problem.structure, sums)

    def on_mesh(params: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
        found: tuple[Array, PyTree] = on_any_mesh(
            clipped, lambda spec: (spec, specs_like(params)), params, batch, key
        )
        return found

    return public(on_mesh, "clipped_grad")


def weighted_sum(gradients: Gradients, weights: Array) -> list[Array]:
    """The sum of the examples' gradients times weights, for every parameter."""
    leaves, captured = gradients.problem.leaves, gradients.captured
    totals = [jnp.zeros_like(leaf) for leaf in leaves]
    sums: dict[int, Array] = {}
    for group in gradients.groups:
        if group.kind == "fallback":
            for leaf, total in zip(
                group.leaves, _by_itself(gradients, group, weights), strict=True
            ):
                totals[leaf] = total
            continue
        for site in group.sites:
            run, inputs = linear_in_parameter(site), captured.inputs[site.number]
            cotangents = _scaled(captured.cotangents[site.number][:, 0], weights)
            transpose = jax.linear_transpose(
                lambda value, run=run, inputs=inputs: run(value, inputs),
                gradients.known[site.name],
            )
            (found,) = transpose(cotangents)
            sums[site.name] = sums[site.name] + found if site.name in sums else found
        for name in group.tapped:
            gradient = captured.gradients[name][:, 0]
            sums[name] = jnp.tensordot(weights.astype(gradient.dtype), gradient, 1)
    found_leaves = [
        leaf for group in gradients.groups if group.kind != "fallback" for leaf in group.leaves
    ]
    pull_back = pull_back_of(gradients, found_leaves, list(sums))
    for leaf, total in zip(found_leaves, pull_back(list(sums.values())), strict=True):
        totals[leaf] = total
    return totals


def _by_itself(gradients: Gradients, group: Group, weights: Array) -> list[Array]:
    problem = gradients.problem

    def weighted_loss(own: list[Array]) -> Array:
        leaves = problem.leaves_with(group.leaves, own)
        losses = jax.vmap(problem.run, in_axes=(None, 0))(leaves, gradients.batch)
        return jnp.vdot(weights.astype(losses.dtype), losses)

    found: list[Array] = jax.grad(weighted_loss)([problem.leaves[leaf] for leaf in group.leaves])
    return found


def _scaled(array: Array, weights: Array) -> Array:
    return array * weights.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))


def _add_noise(sums: list[Array], key: PRNGKeyArray, deviation: ArrayLike) -> list[Array]:
    keys = jax.random.split(key, max(1, len(sums)))
    return [
        a if _is_integer(a) else a + deviation * jax.random.normal(k, a.shape, a.dtype)
        for k, a in zip(keys, sums, strict=False)
    ]


def _is_integer(array: Array) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact)


def _check(
    max_norm: ArrayLike, reduction: str, noise_multiplier: float, key: PRNGKeyArray | None
) -> None:
    if not isinstance(max_norm, jax.core.Tracer):
        if jnp.ndim(max_norm) or isinstance(max_norm, (bool, str)):
            raise BadType(f"expected max_norm to be a number, got {describe(max_norm)}")
        if not np.all(np.asarray(max_norm) > 0):
            raise BadValue(f"max_norm must be positive, got {max_norm}")
    if reduction not in ("sum", "mean"):
        raise BadValue(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if not isinstance(noise_multiplier, (int, float)) or noise_multiplier < 0:
        raise BadValue(f"noise_multiplier must be a number >= 0, got {noise_multiplier!r}")
    if noise_multiplier and not isinstance(max_norm, jax.core.Tracer) and not np.isfinite(max_norm):
        raise BadValue(f"noise needs a finite max_norm, got {max_norm}")
    if (key is None) != (noise_multiplier == 0):
        raise BadValue(f"expected a key with noise and none without, got {describe(key)}")
    if key is not None:
        check_key(key)
