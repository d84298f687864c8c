"""What rules ask of an equation of a jaxpr."""

from typing import cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike

AnyJaxpr = Jaxpr | ClosedJaxpr


def bind(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> list[Array]:
    """Runs an equation's primitive on other arrays, with some parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params | changed)  # type: ignore[no-untyped-call]
    results = eqn.primitive.bind(*arrays, **params)  # type: ignore[no-untyped-call]
    return list(results) if eqn.primitive.multiple_results else [results]


def bind_one(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> Array:
    """`bind` for primitives of one result."""
    (result,) = bind(eqn, *arrays, **changed)
    return result


def aval(atom: Var | Literal) -> jax.core.ShapedArray:
    """Shape and dtype of a variable."""
    return cast("jax.core.ShapedArray", atom.aval)


def out_shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    return [aval(var).shape for var in eqn.outvars]


def open_jaxpr(jaxpr: AnyJaxpr) -> tuple[Jaxpr, list[ArrayLike]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))  # type: ignore[arg-type]
