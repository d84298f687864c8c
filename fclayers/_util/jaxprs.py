"""What transformations ask of a jaxpr and its equations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike

from fclayers._util.meshes import varying_with

AnyJaxpr = Jaxpr | ClosedJaxpr

_OWN_FOLDERS = (str(Path(str(jax.__file__)).parent), str(Path(__file__).parents[1]))

# Plain calls, and the parameter that holds their jaxpr.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


def bind(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> list[Array]:
    """Runs an equation's primitive on other arrays, with some parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params | changed)  # type: ignore[no-untyped-call]
    results = eqn.primitive.bind(*varying_with((), list(arrays)), **params)  # type: ignore[no-untyped-call]
    return list(results) if eqn.primitive.multiple_results else [results]


def bind_one(eqn: JaxprEqn, *arrays: ArrayLike, **changed: object) -> Array:
    """`bind` for primitives of one result."""
    (result,) = bind(eqn, *arrays, **changed)
    return result


def aval(atom: Var | Literal) -> jax.core.ShapedArray:
    """Shape and dtype of a variable."""
    return cast("jax.core.ShapedArray", atom.aval)


def out_shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    """Shapes of the results."""
    return [aval(var).shape for var in eqn.outvars]


def open_jaxpr(jaxpr: AnyJaxpr) -> tuple[Jaxpr, list[ArrayLike]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))  # type: ignore[arg-type]


def traced_consts(
    consts: Sequence[ArrayLike],
) -> tuple[list[Array], Callable[[Sequence[Array]], list[ArrayLike]]]:
    """The constants that are traced, and all of them from other values of those."""
    is_traced = [isinstance(const, jax.core.Tracer) for const in consts]

    def merge(values: Sequence[Array]) -> list[ArrayLike]:
        rest = iter(values)
        return [next(rest) if t else c for c, t in zip(consts, is_traced, strict=True)]

    return [cast("Array", c) for c, t in zip(consts, is_traced, strict=True) if t], merge


def called_jaxpr(eqn: JaxprEqn) -> tuple[AnyJaxpr | None, int]:
    """The jaxpr that a plain call runs, or `None`, and its first operand."""
    name = eqn.primitive.name
    if name in _CALLS:
        return eqn.params[_CALLS[name]], 0
    platforms = eqn.params.get("branches_platforms") or ()
    if name == "cond" and None in platforms:
        # Formulations for one platform hide what is computed; the default does not.
        return eqn.params["branches"][platforms.index(None)], 1
    return None, 0


def source_line(eqns: Sequence[JaxprEqn]) -> str:
    """The innermost line outside JAX and this library, or else the innermost outside JAX."""
    tracebacks: list[Any] = [eqn.source_info.traceback for eqn in eqns]
    frames = [frame for traceback in tracebacks if traceback for frame in traceback.frames]
    for own in (_OWN_FOLDERS, _OWN_FOLDERS[:1]):
        for frame in frames:
            if not frame.file_name.startswith(own):
                return f"{Path(frame.file_name).name}:{frame.line_num}"
    return "?"


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan."""
    inner, _ = open_jaxpr(eqn.params["jaxpr"])
    # What is scanned or stacked has one axis more outside than inside.
    scanned = [
        aval(outside).ndim > aval(inside).ndim
        for outside, inside in zip(eqn.invars, inner.invars, strict=True)
    ]
    num_carry = sum(
        aval(outside).ndim == aval(inside).ndim
        for outside, inside in zip(eqn.outvars, inner.outvars, strict=True)
    )
    return scanned.count(False) - num_carry, num_carry
