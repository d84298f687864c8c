"""What a step costs in pieces, and window by window."""

from collections.abc import Callable, Sequence
from math import prod

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Array

from fclayers.sliding.equations import aval, out_shapes
from fclayers.sliding.pieces import Pieces, arrays_of
from fclayers.sliding.values import Grid, Value

# All windows of a step at once are no larger than a chunk of windows.
CHUNK_BYTES = 2**26
# Elements in pieces take more time than those of windows in batches.
_PIECES_ARE_SLOWER = 1.5
# Primitives that compute nothing.
_MOVES = """
    broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice gather iota pad
    reshape rev slice split squeeze stack stop_gradient transpose
"""
# Larger constants are computed by the program.
_MAX_FOLDED = 2**16


def is_worth_sharing(
    grid: Grid, run: Callable[[Sequence[Pieces]], list[Pieces]], operands: Sequence[Pieces]
) -> bool:
    """Whether operands and results in pieces have far fewer elements than those of all windows."""
    varying = [
        block.array for p in operands for block in p.blocks.values() if not block.is_constant
    ]

    def arrays(varying: Sequence[Array]) -> list[list[Array]]:
        rest = iter(varying)
        values = [
            p._replace(
                blocks={
                    index: block if block.is_constant else block._replace(array=next(rest))
                    for index, block in p.blocks.items()
                }
            )
            for p in operands
        ]
        results[:] = run(values)
        return [[block.array for block in result.blocks.values()] for result in results]

    results: list[Pieces] = []
    made = jax.tree.leaves(jax.eval_shape(arrays, varying))
    elements = sum(prod(array.shape) for array in (*made, *arrays_of(operands)))
    windows = prod(grid.counts) * sum(prod(p.shape) for p in (*results, *operands))
    size = sum(prod(array.shape) * array.dtype.itemsize for array in made)
    return bool(elements * _PIECES_ARE_SLOWER <= windows or size <= CHUNK_BYTES)


def count_operations(grid: Grid, eqn: JaxprEqn, results: Sequence[object]) -> tuple[float, float]:
    """Operations of a step on all windows, as it is run, and window by window."""
    one = _count_for_one(eqn)
    shared = [value for value in results if isinstance(value, (Value, Pieces))]
    size = sum(prod(shape) for shape in out_shapes(eqn))
    windows = one * prod(grid.counts)
    if not shared or not size:
        return windows, windows
    return one * sum(array.size for array in arrays_of(shared)) / size, windows


def _count_for_one(eqn: JaxprEqn) -> float:
    """Multiplications, additions and the like of an equation; none for moving elements."""
    name, params = eqn.primitive.name, eqn.params
    results = float(sum(prod(shape) for shape in out_shapes(eqn)))
    inner = [getattr(p, "jaxpr", p) for p in params.values()]
    jaxprs = [jaxpr for jaxpr in inner if isinstance(jaxpr, Jaxpr)]
    each = 1.0
    if name in _MOVES.split():
        each = 0
    elif name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        each = 2 * prod(aval(eqn.invars[0]).shape[i] for i in contracted)
    elif name == "conv_general_dilated":
        kernel, (_, inputs, *spatial) = aval(eqn.invars[1]).shape, params["dimension_numbers"][1]
        taps = prod(kernel[i] for i in spatial) / prod(params["lhs_dilation"])
        each = 2 * taps * kernel[inputs]
    elif "window_dimensions" in params:
        each = prod(params["window_dimensions"])
    elif name.startswith(("reduce_", "arg")):
        return float(prod(aval(eqn.invars[0]).shape))
    elif jaxprs:
        times = float(params.get("length", 1))
        return times * sum(_count_for_one(e) for jaxpr in jaxprs for e in jaxpr.eqns)
    return results * each


def is_foldable(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    """Whether an equation of constants can be run while the function is traced."""
    small = all(value.array.size <= _MAX_FOLDED for value in values)
    return (
        small
        and all(value.is_constant for value in values)
        and not any(isinstance(value.array, jax.core.Tracer) for value in values)
        and all(prod(shape) <= _MAX_FOLDED for shape in out_shapes(eqn))
    )
