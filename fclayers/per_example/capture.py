"""Runs a program on a batch: the factors of every example's gradient, from one backward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from fclayers._util.jaxprs import aval, bind
from fclayers._util.meshes import varying_with
from fclayers.per_example.program import Loop, Node, Program, Site, Steps

Arrays = dict[int, Array]


class Captured(NamedTuple):
    """What the gradients of examples are made of; every array has the examples in front.

    Attributes:
        outs: The function's result.
        inputs: The other operands of every site, stacked for the loops around it.
        cotangents: Cotangents of every site's result `(N, outs, ...)`, stacked alike.
        gradients: Gradients of the known values that are formed `(N, outs, ...)`.
    """

    outs: Array
    inputs: dict[int, list[Array]]
    cotangents: Arrays
    gradients: Arrays


def known_values(
    program: Program, leaves: Sequence[Array], names: Sequence[int] | None = None
) -> dict[int, ArrayLike]:
    """Values that depend on no example, by name: all, or what some are computed from."""
    values: dict[int, ArrayLike] = dict(enumerate(leaves)) | program.constants
    wanted = set(names or ())
    nodes = []
    for node in reversed(program.nodes):
        if names is None or wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            nodes.append(node)
    for node in reversed(nodes):
        results = run_node(node, [values[name] for name in node.inputs])
        values.update(zip(node.outputs, results, strict=True))
    return values


def run_node(node: Node, arrays: Sequence[ArrayLike]) -> list[Any]:
    """Computes known values, for all passes of the loops around."""
    run = node.run
    for flags in reversed(node.loops):
        run = jax.vmap(run, in_axes=tuple(0 if flag else None for flag in flags))
    return run(*arrays)


def capture(
    program: Program,
    known: dict[int, ArrayLike],
    batch: Sequence[Array],
    sites: Sequence[Site],
    formed: Sequence[int],
    *,
    scalar: bool,
) -> Captured:
    """Runs the function and one backward pass per result.

    Zeros are added to the results of `sites` and to the values named in `formed`, the taps; their
    gradients are the cotangents. The parameters are not differentiated.
    """
    num_leaves = len(program.shapes)
    zeros = varying_with(batch, {site.number: _zeros(site) for site in sites})
    zeros_of_values = {name: jnp.zeros_like(known[name]) for name in formed}

    def run_example(example: Sequence[Array]) -> Captured:
        def run(taps: Arrays, taps_of_values: Arrays) -> tuple[Array, dict[int, list[Array]]]:
            env: dict[int, Any] = known | dict(enumerate(example, num_leaves))
            env |= {name: env[name] + tap for name, tap in taps_of_values.items()}
            inputs = run_steps(program.steps, env, taps)
            (out,) = program.outs
            return jnp.asarray(env[out]), inputs

        out, pull_back, inputs = jax.vjp(run, zeros, zeros_of_values, has_aux=True)
        if scalar:
            found = jax.tree.map(lambda a: a[None], pull_back(jnp.ones_like(out)))
        else:
            found = pull_back_each(pull_back, out)
        return Captured(out, inputs, *found)

    return jax.vmap(run_example)(list(batch))


def pull_back_each(pull_back: Callable[[Array], Any], out: Array) -> Any:
    """The gradients of every element of a result, along a first axis."""
    basis = jnp.eye(out.size, dtype=out.dtype).reshape(out.size, *out.shape)
    basis = varying_with(out, basis)
    return jax.vmap(pull_back)(basis)


def run_steps(steps: Steps, env: dict[int, Any], taps: Mapping[int, Array]) -> dict[int, list[Any]]:
    """Runs steps on one example, adds their results to `env`; returns the inputs of the sites."""
    inputs: dict[int, list[Any]] = {}
    for step in steps:
        if isinstance(step, Loop):
            inputs |= _run_loop(step, env, taps)
            continue
        operands = [env[name] for name in step.inputs]
        results = bind(step.eqn, *operands)
        if step.site is not None and step.site.number in taps:
            results[0] = results[0] + taps[step.site.number]
            del operands[step.site.operand]
            inputs[step.site.number] = operands
        env.update(zip(step.outputs, results, strict=True))
    return inputs


def _run_loop(loop: Loop, env: dict[int, Any], taps: Mapping[int, Array]) -> dict[int, list[Any]]:
    def body(carry: Sequence[Any], slices: PyTree) -> tuple[list[Any], PyTree]:
        xs, known, inner_taps = slices
        inner = dict(env)
        inner.update(zip([inside for _, inside, _ in loop.carry], carry, strict=True))
        inner.update(zip([inside for _, inside in loop.xs], xs, strict=True))
        inner.update(zip(loop.known, known, strict=True))
        inputs = run_steps(loop.steps, inner, inner_taps)
        ys = [jnp.asarray(inner[inside]) for inside, _ in loop.ys]
        after = [jnp.asarray(inner[name]) for _, _, name in loop.carry]
        return after, (ys, inputs)

    slices = (
        [env[outside] for outside, _ in loop.xs],
        [env[name] for name in loop.known],
        {index: taps[index] for index in loop.sites if index in taps},
    )
    before = [jnp.asarray(env[name]) for name, _, _ in loop.carry]
    after, (ys, inputs) = lax.scan(body, before, slices, loop.length, loop.reverse)
    env.update(zip(loop.carried, after, strict=True))
    env.update(zip([outside for _, outside in loop.ys], ys, strict=True))
    found: dict[int, list[Any]] = inputs
    return found


def _zeros(site: Site) -> Array:
    out = aval(site.eqn.outvars[0])
    return jnp.zeros((*site.lengths, *out.shape), out.dtype)


def linear_in_parameter(site: Site) -> Callable[..., Array]:
    """The site as a function of the parameter and its inputs, for all loops and examples."""

    def run(value: Array, inputs: list[Array]) -> Array:
        operands = [*inputs[: site.operand], value, *inputs[site.operand :]]
        return bind(site.eqn, *operands)[0]

    for stacked in reversed(site.stacked):
        run = jax.vmap(run, in_axes=(0 if stacked else None, 0))
    return jax.vmap(run, in_axes=(None, 0))
