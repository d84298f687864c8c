"""A function, its parameters and a batch: checked, traced for one example, taken apart."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PyTree

from fclayers._util.checks import describe
from fclayers._util.errors import BadType, BadValue
from fclayers._util.meshes import varying_with
from fclayers._util.trees import path_name
from fclayers.per_example.program import Program, take_apart

Fun = Callable[[PyTree, PyTree], Any]


class Problem(NamedTuple):
    """A function of parameters and one example, and what it is called with."""

    run: Callable[[Sequence[Array], Sequence[Array]], Array]
    program: Program
    leaves: list[Array]
    structure: jax.tree_util.PyTreeDef

    def leaves_with(self, places: Sequence[int], arrays: Sequence[Array]) -> list[Array]:
        """The parameters with others in some places."""
        leaves = list(self.leaves)
        for place, array in zip(places, arrays, strict=True):
            leaves[place] = array
        return leaves


def pose(fun: Fun, params: PyTree, batch: PyTree, *, scalar: bool) -> tuple[Problem, list[Array]]:
    """Traces a function for one example; returns it with the arrays of the batch."""
    if not callable(fun):
        raise BadType(f"expected a function of params and one example, got {describe(fun)}")
    leaves, structure = jax.tree.flatten(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not isinstance(leaf, (int, float, complex)) and not hasattr(leaf, "dtype"):
            raise BadType(f"expected params of arrays, got {describe(leaf)} at {path_name(path)!r}")
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    arrays, batch_structure = jax.tree.flatten(batch)
    count_examples(batch)
    arrays = [array if hasattr(array, "dtype") else jnp.asarray(array) for array in arrays]
    # Inside `jax.shard_map`, gradients of what is the same on all devices are sums over them.
    leaves, arrays = varying_with((), (leaves, arrays))
    one = [jax.eval_shape(lambda a: a[0], array) for array in arrays]

    def flat(leaves: Sequence[Array], example: Sequence[Array]) -> Any:
        return fun(
            jax.tree.unflatten(structure, leaves), jax.tree.unflatten(batch_structure, example)
        )

    shapes = [jax.typeof(leaf) for leaf in leaves]
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(shapes, one)
    if jaxpr.effects:
        raise BadValue(f"the function has side effects, {set(jaxpr.effects)}")
    _check_result(out, scalar=scalar)

    def run(leaves: Sequence[Array], example: Sequence[Array]) -> Array:
        result: Array = jaxpr_as_fun(jaxpr)(*leaves, *example)[0]
        return result

    return Problem(run, take_apart(jaxpr, shapes, len(one)), leaves, structure), arrays


def count_examples(batch: PyTree) -> int:
    """The number of examples of a batch, along the first axes of all its arrays."""
    lengths = {
        path_name(path): jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        for path, leaf in jax.tree.leaves_with_path(batch)
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        found = ", ".join(f"{path or 'it'} has {length}" for path, length in lengths.items())
        raise BadValue(
            "expected a batch of arrays with the same number of examples along their first axes; "
            f"{found or 'there are no arrays'}"
        )
    (count,) = set(lengths.values())
    if not count:
        raise BadValue("expected at least one example, got none")
    return int(count)


def _check_result(out: PyTree, *, scalar: bool) -> None:
    what = "a scalar" if scalar else "one array"
    arrays = jax.tree.leaves(out)
    if len(arrays) != 1 or out is not arrays[0]:
        raise BadType(f"expected a function that returns {what}, got {describe(out)}")
    if scalar and out.shape:
        raise BadValue(
            f"expected a loss of one example, a scalar; it returns an array of shape {out.shape}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise BadType(f"expected a function that returns real numbers, got {describe(out)}")
