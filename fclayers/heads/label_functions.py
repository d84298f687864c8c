"""Labels as a function of the numbers of some classes, which gives their probabilities."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jaxtyping import Array, Float, Integer, PyTree

from fclayers._util.checks import describe, is_array
from fclayers._util.errors import BadType, BadValue

LabelFunction = Callable[[Integer[Array, "chunk"]], Float[Array, "*batch chunk"]]


class Traced(NamedTuple):
    """A function of numbers of classes, for one number of them."""

    length: int
    jaxpr: Jaxpr


def trace_labels(
    labels: LabelFunction, lengths: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[tuple[Traced, ...], PyTree]:
    """The function for chunks of these lengths, and the arrays that it closes over.

    As operands of a pass these have derivatives, in every mode.
    """
    traced, arrays = [], []
    for length in lengths:
        numbers = jax.ShapeDtypeStruct((length,), jnp.int32)  # type: ignore[no-untyped-call]
        closed, found = jax.make_jaxpr(labels, return_shape=True)(numbers)
        if not is_array(found) or not jnp.issubdtype(found.dtype, jnp.floating):
            raise BadType(
                "labels(classes) must return probabilities, a floating-point array, "
                f"got {describe(found)}"
            )
        if found.shape != (*batch, length):
            raise BadValue(
                f"labels(classes) for {length} classes must return the shape {(*batch, length)} of "
                f"the batch and these classes, got {describe(found)}"
            )
        traced.append(Traced(length, closed.jaxpr))
        arrays.append(tuple(closed.consts))
    return tuple(traced), tuple(arrays)


def call_labels(traced: tuple[Traced, ...], arrays: PyTree, classes: Any) -> Array:
    """The probabilities `(rows, chunk)` of classes."""
    place = [each.length for each in traced].index(len(classes))
    (found,) = jaxpr_as_fun(ClosedJaxpr(traced[place].jaxpr, arrays[place]))(classes)
    rows: Array = found.reshape(prod(found.shape[:-1]), found.shape[-1])
    return rows
