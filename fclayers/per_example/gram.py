"""Inner products of the gradients of two batches' examples."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fclayers._util.errors import public
from fclayers.per_example.chunks import chunk_of, map_examples
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
    forming_operations,
    keep_none,
    leaf_elements,
    pair_operations,
)
from fclayers.per_example.meshes import on_any_mesh
from fclayers.per_example.problem import Fun, pose
from fclayers.per_example.sites import wide


@public
def gradient_gram(loss: Fun) -> Callable[..., Float[Array, "n m"]]:
    """Makes a function that returns the inner products of the examples' gradients.

    They say how a step on one example changes the loss of another: the influence of training on
    test examples (TracIn), and the kernel of data selection.

    Args:
        loss: A function `loss(params, example)` of one example that returns a real scalar.

    Returns:
        A function `gram(params, batch, other_batch=None)` that returns the inner products `(N, M)`
        of the gradients of every example of `batch` and every one of `other_batch`, by default
        `batch` again. It can be jitted and differentiated.

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
        >>> train = jnp.ones((8, 3)), jnp.ones((8, 2))
        >>> test = jnp.ones((5, 3)), jnp.ones((5, 2))
        >>> fc.gradient_gram(loss)(params, train, test).shape
        (8, 5)

    Source: `Pruthi et al. 2020 <https://arxiv.org/abs/2002.08484>`_ for the use.
    """

    def gram(params: PyTree, batch: PyTree, other_batch: PyTree) -> Array:
        ours, theirs = _both(loss, params, batch, other_batch, scalar=True)
        return inner_products(ours, theirs)[:, :, 0, 0]

    def on_mesh(params: PyTree, batch: PyTree, other_batch: PyTree = None) -> Array:
        found: Array = on_any_mesh(gram, lambda spec: spec, params, batch, other_batch)
        return found

    return public(on_mesh, "gradient_gram")


@public
def empirical_ntk(fun: Fun) -> Callable[..., Float[Array, "..."]]:
    """Makes a function that returns the empirical neural tangent kernel.

    Args:
        fun: A function `fun(params, example)` of one example that returns an array of real numbers,
            of any shape `out`.

    Returns:
        A function `ntk(params, x1, x2=None)` of two batches, by default the same, that returns the
        kernel `(N, M, *out, *out)`: for every pair of examples and of results, the inner product of
        the gradients of the results with respect to all parameters. It can be jitted and
        differentiated.

    Raises:
        TypeError: `fun` does not return one array of real numbers.
        ValueError: As `per_example_norms`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_mlp(jax.random.key(0), (3, 16, 2))
        >>> x1, x2 = jnp.ones((8, 3)), jnp.ones((5, 3))
        >>> fc.empirical_ntk(fc.apply_mlp)(params, x1, x2).shape
        (8, 5, 2, 2)

    Source: `Jacot et al. 2018 <https://arxiv.org/abs/1806.07572>`_;
    `Novak et al. 2022 <https://arxiv.org/abs/2206.08720>`_ for its computation.
    """

    def ntk(params: PyTree, x1: PyTree, x2: PyTree) -> Array:
        ours, theirs = _both(fun, params, x1, x2, scalar=False)
        kernel = inner_products(ours, theirs)
        out = ours.captured.outs.shape[1:]
        return kernel.reshape(*kernel.shape[:2], *out, *out)

    def on_mesh(params: PyTree, x1: PyTree, x2: PyTree = None) -> Array:
        found: Array = on_any_mesh(ntk, lambda spec: spec, params, x1, x2)
        return found

    return public(on_mesh, "empirical_ntk")


def _both(
    fun: Fun, params: PyTree, batch: PyTree, other_batch: PyTree, *, scalar: bool
) -> tuple[Gradients, Gradients]:
    problem, arrays = pose(fun, params, batch, scalar=scalar)
    ours = find_gradients(problem, arrays, keep_none, scalar=scalar)
    if other_batch is None:
        return ours, ours
    problem, arrays = pose(fun, params, other_batch, scalar=scalar)
    return ours, find_gradients(problem, arrays, keep_none, scalar=scalar)


def inner_products(ours: Gradients, theirs: Gradients) -> Array:
    """The inner products `(N, M, outs, outs)` of all pairs of examples' gradients."""
    outs = ours.num_outs
    total: Array = jnp.zeros((ours.size, theirs.size, outs, outs), ours.captured.outs.dtype)
    for group, other_group in zip(ours.groups, theirs.groups, strict=True):
        total = total + _products_of_group(ours, theirs, group, other_group)
    return total


def _products_of_group(
    ours: Gradients, theirs: Gradients, group: Group, other_group: Group
) -> Array:
    by_factors = _is_by_factors(ours, group, theirs.size)
    prepare: Callable[..., Callable[[Example], Any]] = _factors if by_factors else _vectors
    compare: Callable[..., Array] = _compare_factors if by_factors else _compare_vectors
    size = (bytes_of_factors if by_factors else bytes_of_gradients)(ours, group)
    ours_of, theirs_of = prepare(ours, group), prepare(theirs, other_group)

    def against_all(example: Example) -> Array:
        one = ours_of(example)
        found: Array = map_examples(
            lambda other: compare(group, one, theirs_of(other)),
            theirs.examples(other_group),
            theirs.size,
            size,
        )
        return found

    # A chunk of the one is compared with a chunk of the other at a time.
    each = size + (size if by_factors else 8 * ours.num_outs**2) * chunk_of(theirs.size, size)
    products: Array = map_examples(against_all, ours.examples(group), ours.size, each)
    return products


def _is_by_factors(gradients: Gradients, group: Group, others: int) -> bool:
    """Whether inner products take fewer operations by factors than between formed gradients."""
    outs = gradients.num_outs
    formed = 2 * forming_operations(group, outs) / min(gradients.size, others)
    products = outs**2 * leaf_elements(gradients.problem.program, group)
    return group.kind == "factors" and pair_operations(group, outs) <= formed + products


def _factors(gradients: Gradients, group: Group) -> Callable[[Example], list[Factors]]:
    return lambda example: [factors_of(site, example[0]) for site in group.sites]


def _compare_factors(group: Group, one: list[Factors], other: list[Factors]) -> Array:
    sites, total = list(group.sites), jnp.zeros(())
    for pair in group.pairs:
        a, b = pair.one, pair.other
        total = total + pair.factor * inner(sites, pair, one[a], other[b])
        if a != b:
            total = total + pair.factor * inner(sites, pair, other[a], one[b]).T
    return total


def _vectors(gradients: Gradients, group: Group) -> Callable[[Example], list[Array]]:
    form = former(gradients, group)
    return lambda example: [wide(g).reshape(gradients.num_outs, -1) for g in form(example)]


def _compare_vectors(group: Group, one: list[Array], other: list[Array]) -> Any:
    products = [jnp.einsum("ri,si->rs", g, h.conj()).real for g, h in zip(one, other, strict=True)]
    return sum(products[1:], products[0])
