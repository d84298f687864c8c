"""Rules for primitives that treat every element alike."""

from jax.extend.core import JaxprEqn

from fclayers._util.jaxprs import bind_one
from fclayers.sliding.layout import align
from fclayers.sliding.values import Grid, Value, over_positions


def elementwise(grid: Grid, eqn: JaxprEqn, *values: Value) -> Value:
    """Any mix of shared, constant and per-position operands; scalars go with every shape."""
    fitted = align([value for value in values if value.dims])
    dims = fitted[0].dims if fitted else ()
    shaped = iter(fitted)
    operands = [next(shaped) if value.dims else value for value in values]
    array, positions = over_positions(lambda *arrays: bind_one(eqn, *arrays), *operands)
    return Value(array, dims, positions)
