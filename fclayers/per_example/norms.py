"""The norm of every example's gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fclayers._util.errors import public
from fclayers.per_example.chunks import map_examples, map_in_cache
from fclayers.per_example.factors import Factors, factors_of, inner
from fclayers.per_example.gradients import (
    Example,
    Gradients,
    bytes_of_factors,
    bytes_of_gradients,
    find_gradients,
    former,
)
from fclayers.per_example.groups import (
    Group,
    formed_norm_operations,
    keep_none,
    pair_operations,
)
from fclayers.per_example.meshes import on_any_mesh
from fclayers.per_example.problem import Fun, pose
from fclayers.per_example.program import Program
from fclayers.per_example.sites import wide


@public
def per_example_norms(
    loss: Fun, *, per_leaf: bool = False
) -> Callable[[PyTree, PyTree], Float[Array, "n"] | PyTree[Float[Array, "n"]]]:
    """Makes a function that returns the norm of the gradient of every example.

    Equal to the norms of `jax.vmap(jax.grad(loss), (None, 0))(params, batch)`, without those
    gradients: where a parameter meets an example in a product, the gradient is an outer product,
    and its norm follows from the two vectors.

    Args:
        loss: A function `loss(params, example)` of one example that returns a real scalar.
        per_leaf: Whether to return the norm for every array of the parameters.

    Returns:
        A function `norms(params, batch)`, where `batch` is a pytree of arrays with the examples
        along the first axes. It returns the norms `(N,)` over all parameters together, or a tree of
        them like `params`; those of integers are zero. It can be jitted, differentiated and
        sharded over the batch.

    Raises:
        TypeError: `loss` does not return one real number, or `params` holds something else than
            arrays.
        ValueError: The loss is not a scalar, the arrays of the batch have different numbers of
            examples, or none, or the function has side effects.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 3, 2)
        >>> def loss(params, example):
        ...     x, y = example
        ...     return jnp.sum((fc.apply_linear(params, x) - y) ** 2)
        >>> batch = jnp.ones((8, 3)), jnp.ones((8, 2))
        >>> norms = jax.jit(fc.per_example_norms(loss))(params, batch)
        >>> norms.shape
        (8,)

    Source: `Goodfellow 2015 <https://arxiv.org/abs/1510.01799>`_ for fully connected layers;
    `Li et al. 2022 <https://arxiv.org/abs/2110.05679>`_ for sequences.
    """

    def norms(params: PyTree, batch: PyTree) -> PyTree:
        problem, arrays = pose(loss, params, batch, scalar=True)
        gradients = find_gradients(problem, arrays, keep_none)
        squares = squared_norms(gradients)
        if not per_leaf:
            return jnp.sqrt(total_of(gradients, squares))
        zeros = jnp.zeros(gradients.size, gradients.captured.outs.dtype)
        each = [jnp.sqrt(squares.get(i, zeros)) for i in range(len(problem.leaves))]
        return jax.tree.unflatten(problem.structure, each)

    def on_mesh(params: PyTree, batch: PyTree) -> PyTree:
        return on_any_mesh(norms, lambda spec: spec, params, batch)

    return public(on_mesh, "per_example_norms")


def squared_norms(gradients: Gradients) -> dict[int, Array]:
    """The squares of the norms `(N,)` of all examples' gradients, by parameter."""
    found: dict[int, Array] = {}
    for group in gradients.groups:
        examples, count = gradients.examples(group), gradients.size
        if is_by_factors(gradients.problem.program, group):
            size = bytes_of_factors(gradients, group)
            squares = map_examples(_by_factors(group), examples, count, size)
        else:
            size = bytes_of_gradients(gradients, group)
            run = map_in_cache if group.sites else map_examples
            squares = run(_formed(gradients, group), examples, count, size)
        found.update(zip(group.leaves, squares, strict=True))
    return found


def total_of(gradients: Gradients, squares: dict[int, Array]) -> Array:
    """The squares of the norms over all parameters."""
    return sum(squares.values(), jnp.zeros(gradients.size, gradients.captured.outs.dtype))


def is_by_factors(program: Program, group: Group) -> bool:
    """Whether norms take fewer operations by factors than by forming the gradients."""
    return group.kind == "factors" and pair_operations(group) <= formed_norm_operations(
        program, group
    )


def _by_factors(group: Group) -> Callable[[Example], list[Array]]:
    def of_one(example: Example) -> list[Array]:
        factors = [factors_of(site, example[0]) for site in group.sites]
        total: Array = jnp.zeros(())
        for pair in group.pairs:
            one, other = factors[pair.one], factors[pair.other]
            if pair.one == pair.other and _is_one_position(one):
                product = _square(one.rows).sum((-2, -1)) * _square(one.columns).sum((0, -2, -1))
                total = total + pair.factor * product.sum()
                continue
            times = 1 if pair.one == pair.other else 2
            total = total + times * pair.factor * inner(list(group.sites), pair, one, other)[0, 0]
        return [total]

    return of_one


def _formed(gradients: Gradients, group: Group) -> Callable[[Example], list[Array]]:
    form = former(gradients, group)
    return lambda example: [_square(wide(g)).sum() for g in form(example)]


def _is_one_position(factors: Factors) -> bool:
    return factors.rows.ndim == 3 and factors.rows.shape[1] == 1


def _square(array: Array) -> Array:
    squared: Array = (array * array.conj()).real
    return squared
