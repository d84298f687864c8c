"""What rules ask of an equation of a jaxpr."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike

AnyJaxpr = Jaxpr | ClosedJaxpr

_OWN_FOLDERS = (str(Path(str(jax.__file__)).parent), str(Path(__file__).parents[1]))


def bind(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> list[Array]:
    """Runs an equation's primitive on other arrays, with some parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params | changed)  # type: ignore[no-untyped-call]
    results = eqn.primitive.bind(*arrays, **params)  # type: ignore[no-untyped-call]
    return list(results) if eqn.primitive.multiple_results else [results]


def bind_one(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> Array:
    """`bind` for primitives of one result."""
    (result,) = bind(eqn, *arrays, **changed)
    return result


def with_python_integers(eqn: JaxprEqn) -> JaxprEqn:
    """The equation without the NumPy integers that JAX keeps as they were passed to it."""
    params = jax.tree.map(lambda p: int(p) if isinstance(p, np.integer) else p, eqn.params)
    replaced: JaxprEqn = eqn.replace(params=params)
    return replaced


def aval(atom: Var | Literal) -> jax.core.ShapedArray:
    """Shape and dtype of a variable."""
    return cast("jax.core.ShapedArray", atom.aval)


def out_shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    return [aval(var).shape for var in eqn.outvars]


def open_jaxpr(jaxpr: AnyJaxpr) -> tuple[Jaxpr, list[ArrayLike]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))  # type: ignore[arg-type]


def padding_of(eqn: JaxprEqn) -> dict[int, tuple[int, int]]:
    """The padding at the start and the end of dimensions of the first operand, if there is any."""
    params = eqn.params
    pairs: Iterable[tuple[int, tuple[int, int]]]
    match eqn.primitive.name:
        case "conv_general_dilated":
            spatial = params["dimension_numbers"].lhs_spec[2:]
            pairs = zip(spatial, params["padding"], strict=True)
        case "pad":
            pairs = enumerate((low, high) for low, high, _ in params["padding_config"])
        case _ if "window_dimensions" in params:
            pairs = enumerate(params["padding"])
        case _:
            return {}
    return {dim: pair for dim, pair in pairs if max(pair) > 0}


def contains(jaxpr: Jaxpr, name: str) -> bool:
    """Whether a primitive occurs, at any depth."""
    for eqn in jaxpr.eqns:
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        jaxprs = (getattr(leaf, "jaxpr", leaf) for leaf in inner)
        if eqn.primitive.name == name or any(
            contains(inner, name) for inner in jaxprs if isinstance(inner, Jaxpr)
        ):
            return True
    return False


def source_line(eqns: Sequence[JaxprEqn]) -> str:
    """The innermost line outside JAX and this library, or else the innermost outside JAX."""
    tracebacks: list[Any] = [eqn.source_info.traceback for eqn in eqns]
    frames = [frame for traceback in tracebacks if traceback for frame in traceback.frames]
    for own in (_OWN_FOLDERS, _OWN_FOLDERS[:1]):
        for frame in frames:
            if not frame.file_name.startswith(own):
                return f"{Path(frame.file_name).name}:{frame.line_num}"
    return "?"
