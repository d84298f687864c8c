"""The gradients of a batch's examples, as they can be had: by their factors, or one at a time."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from fclayers.per_example.capture import Captured, capture, known_values, pull_back_each
from fclayers.per_example.factors import factors_of, product_of, sizes_of
from fclayers.per_example.groups import Group, Keep, group, leaf_elements
from fclayers.per_example.problem import Problem

Example = tuple[Captured, list[Array]]


class Gradients(NamedTuple):
    """The gradients of a batch's examples.

    Attributes:
        problem: The function.
        groups: The parameters that meet data.
        known: What depends on the parameters alone, by name.
        captured: What the gradients are made of.
        batch: The arrays of the batch.
        size: Number of examples.
        num_outs: Number of results of the function.
    """

    problem: Problem
    groups: list[Group]
    known: dict[int, ArrayLike]
    captured: Captured
    batch: list[Array]
    size: int
    num_outs: int

    def examples(self, group: Group) -> Example:
        """What of a batch the gradients of a group depend on."""
        sites, captured = {site.number for site in group.sites}, self.captured
        kept = captured._replace(
            inputs={i: a for i, a in captured.inputs.items() if i in sites},
            cotangents={i: a for i, a in captured.cotangents.items() if i in sites},
            gradients={i: a for i, a in captured.gradients.items() if i in group.tapped},
        )
        return kept, self.batch if group.kind == "fallback" else []


def find_gradients(
    problem: Problem, batch: Sequence[Array], keep: Keep, *, scalar: bool = True
) -> Gradients:
    """Runs the function and its backward pass on all examples."""
    program = problem.program
    groups = group(program, keep)
    sites = [site for group in groups for site in group.sites]
    tapped = [name for g in groups if g.kind != "fallback" for name in g.tapped]
    known = known_values(program, problem.leaves)
    captured = capture(program, known, batch, sites, tapped, scalar=scalar)
    size, *out = captured.outs.shape
    return Gradients(problem, groups, known, captured, list(batch), size, prod(out))


def former(gradients: Gradients, group: Group) -> Callable[[Example], list[Array]]:
    """A function that forms one example's gradients `(outs, *shape)` of a group's parameters."""
    problem = gradients.problem
    leaves = [problem.leaves[leaf] for leaf in group.leaves]

    def by_itself(example: Example) -> list[Array]:
        def run(own: list[Array]) -> Array:
            return problem.run(problem.leaves_with(group.leaves, own), example[1])

        out, pull_back = jax.vjp(run, leaves)
        found: list[Array] = pull_back_each(pull_back, out)[0]
        return found

    if group.kind == "fallback":
        return by_itself
    pull_back = pull_back_of(gradients, group.leaves, group.names)

    def form(example: Example) -> list[Array]:
        captured, _ = example
        found = dict(captured.gradients)
        for site in group.sites:
            product = product_of(site, factors_of(site, captured))
            found[site.name] = found[site.name] + product if site.name in found else product
        if group.names == group.leaves:
            return [found[name] for name in group.names]
        dtypes = [jnp.result_type(gradients.known[name]) for name in group.names]
        values = [found[n].astype(d) for n, d in zip(group.names, dtypes, strict=True)]
        pulled: list[Array] = jax.vmap(pull_back)(values)
        return pulled

    return form


def pull_back_of(
    gradients: Gradients, leaves: Sequence[int], names: Sequence[int]
) -> Callable[[list[Array]], list[Array]]:
    """From gradients of known values to those of parameters."""
    problem = gradients.problem

    def values(own: list[Array]) -> list[ArrayLike]:
        known = known_values(problem.program, problem.leaves_with(leaves, own), names)
        return [jnp.asarray(known[name]) for name in names]

    _, pull_back = jax.vjp(values, [problem.leaves[leaf] for leaf in leaves])
    return lambda cotangents: pull_back(cotangents)[0]


def bytes_of_factors(gradients: Gradients, group: Group) -> int:
    """Memory of one example's factors and of the inner products of their positions."""
    numbers = 0
    for site in group.sites:
        s = sizes_of(site)
        inputs = 1 if site.rule.sparse else s.inputs
        numbers += s.blocks * s.positions * (inputs + gradients.num_outs * s.outputs)
    for pair in group.pairs:
        a, b = (sizes_of(group.sites[i]) for i in (pair.one, pair.other))
        numbers += 2 * a.blocks * a.positions * b.positions * gradients.num_outs**2
    return numbers * gradients.captured.outs.dtype.itemsize


def bytes_of_gradients(gradients: Gradients, group: Group) -> int:
    """Memory of one example's gradients, and of what they are formed from."""
    numbers = gradients.num_outs * leaf_elements(gradients.problem.program, group)
    for site in group.sites:
        s = sizes_of(site)
        inputs = 1 if site.rule.sparse else s.inputs
        numbers += s.blocks * s.positions * (inputs + gradients.num_outs * s.outputs)
    return numbers * gradients.captured.outs.dtype.itemsize
