"""Rules for primitives that treat every element alike."""

from typing import Any

from jaxtyping import Array

from fclayers.slide.values import Grid, Value, align, over_positions


def bind(eqn: Any, *arrays: Array, **changed: Any) -> Any:
    """Runs an equation's primitive on other arrays, with some parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params | changed)
    return eqn.primitive.bind(*arrays, **params)


def elementwise(grid: Grid, eqn: Any, *values: Value) -> Value:
    """Any mix of shared, constant and per-position operands; scalars go with every shape."""
    fitted = align(grid, [value for value in values if value.dims])
    dims = fitted[0].dims if fitted else ()
    shaped = iter(fitted)
    operands = [next(shaped) if value.dims else value for value in values]
    array, positions = over_positions(lambda *arrays: bind(eqn, *arrays), *operands)
    return Value(array, dims, positions)
