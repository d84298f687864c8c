"""Second moments of what a layer's gradient is the outer product of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fclayers._util.errors import public
from fclayers._util.meshes import partition
from fclayers._util.reprs import short_repr
from fclayers.per_example.chunks import sum_chunks
from fclayers.per_example.factors import factors_of, sizes_of, stack_of
from fclayers.per_example.gradients import Example, Gradients, bytes_of_factors, find_gradients
from fclayers.per_example.groups import Group, keep_none
from fclayers.per_example.meshes import on_any_mesh
from fclayers.per_example.problem import Fun, pose


class KroneckerFactors(NamedTuple):
    """Second moments of a layer's inputs and of the gradients of its outputs.

    Their Kronecker product, inputs first, approximates the second moment of the gradient of the
    flattened matrix `(in, out)`.

    Attributes:
        inputs: `(*stack, in, in)`: mean over the examples of the sum over positions.
        gradients: `(*stack, out, out)`: mean over examples and positions.
    """

    inputs: Float[Array, "*stack in in"]
    gradients: Float[Array, "*stack out out"]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def kronecker_factors(loss: Fun) -> Callable[[PyTree, PyTree], PyTree]:
    """Makes a function that returns the Kronecker factors of K-FAC for every layer.

    Args:
        loss: A function `loss(params, example)` of one example that returns a real scalar.

    Returns:
        A function `factors(params, batch)` that returns a tree like `params`, with
        `KroneckerFactors` in place of the matrices of products and convolutions, and `None`
        elsewhere: biases (whose gradients are those of their layer, and input 1), scales,
        embeddings, and what is not met in products alone. The axes of a kernel that are contracted
        are flattened to `in`, the others to `out`, both in their order. In front are, where there
        are any, the layers of a scan, and the batch axes of a product or the groups of a
        convolution. A layer that is used several times has the positions of all its uses.

    Raises:
        TypeError: As `per_example_norms`.
        ValueError: As `per_example_norms`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 3, 2)
        >>> def loss(params, example):
        ...     x, y = example
        ...     return jnp.sum((fc.apply_linear(params, x) - y) ** 2)
        >>> batch = jnp.ones((8, 3)), jnp.ones((8, 2))
        >>> factors = fc.kronecker_factors(loss)(params, batch)
        >>> factors.weight.inputs.shape, factors.weight.gradients.shape
        ((3, 3), (2, 2))

    Source: `Martens & Grosse 2015 <https://arxiv.org/abs/1503.05671>`_;
    `Grosse & Martens 2016 <https://arxiv.org/abs/1602.01407>`_ for several positions.
    """

    def factors(params: PyTree, batch: PyTree) -> PyTree:
        problem, arrays = pose(loss, params, batch, scalar=True)
        gradients = find_gradients(problem, arrays, keep_none)
        found: list[KroneckerFactors | None] = [None] * len(problem.leaves)
        for group in gradients.groups:
            if _is_one_matrix(group):
                found[group.leaves[0]] = _moments(gradients, group)
        return jax.tree.unflatten(problem.structure, found)

    def on_mesh(params: PyTree, batch: PyTree) -> PyTree:
        return on_any_mesh(factors, lambda spec: partition(), params, batch)

    return public(on_mesh, "kronecker_factors")


def _is_one_matrix(group: Group) -> bool:
    """Whether a parameter is the same matrix wherever it is used."""
    all_pairs = len(group.sites) * (len(group.sites) + 1) // 2
    return (
        group.kind == "factors"
        and len(group.pairs) == all_pairs
        and not any(pair.swapped for pair in group.pairs)
        and not any(site.rule.sparse for site in group.sites)
    )


def _moments(gradients: Gradients, group: Group) -> KroneckerFactors:
    program, count = gradients.problem.program, gradients.size
    sizes = [sizes_of(site) for site in group.sites]

    def of_chunk(examples: Example) -> tuple[Array, Array]:
        inputs, outputs = [], []
        for site in group.sites:
            rows, columns = jax.vmap(lambda example, site=site: factors_of(site, example))(
                examples[0]
            )
            rows = rows * abs(program.views[site.name].scale)
            inputs.append(jnp.einsum("nbpi,nbpj->bij", rows, rows))
            outputs.append(jnp.einsum("nrbpi,nrbpj->bij", columns, columns))
        return sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0])

    inputs, outputs = sum_chunks(
        of_chunk, gradients.examples(group), count, bytes_of_factors(gradients, group)
    )
    site = group.sites[0]
    stack = stack_of(site) + ([site.rule.blocks] if site.rule.blocks > 1 else [])
    positions = sum(s.positions for s in sizes)
    return KroneckerFactors(
        inputs.reshape(*stack, *inputs.shape[1:]) / count,
        outputs.reshape(*stack, *outputs.shape[1:]) / (count * positions),
    )
