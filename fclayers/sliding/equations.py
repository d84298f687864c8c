"""What rules ask of an equation of a jaxpr."""

from collections.abc import Iterable

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn


def with_python_integers(eqn: JaxprEqn) -> JaxprEqn:
    """The equation without the NumPy integers that JAX keeps as they were passed to it."""
    params = jax.tree.map(lambda p: int(p) if isinstance(p, np.integer) else p, eqn.params)
    replaced: JaxprEqn = eqn.replace(params=params)
    return replaced


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
