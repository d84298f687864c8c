"""What a step costs in pieces, and window by window."""

from collections.abc import Callable, Sequence
from math import prod

import jax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers.sliding.equations import out_shapes
from fclayers.sliding.pieces import Pieces
from fclayers.sliding.values import Grid, Value

# All windows of a step at once are no larger than a chunk of windows.
CHUNK_BYTES = 2**26
# Elements in pieces take more time than those of windows in batches.
_PIECES_ARE_SLOWER = 2
# Larger constants are computed by the program.
_MAX_FOLDED = 2**16


def is_worth_sharing(
    grid: Grid, run: Callable[[Sequence[Pieces]], list[Pieces]], operands: Sequence[Pieces]
) -> bool:
    """Whether the results in pieces have far fewer elements than those of all windows."""
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
    leaves = jax.tree.leaves(jax.eval_shape(arrays, varying))
    elements = sum(prod(leaf.shape) for leaf in leaves)
    windows = prod(grid.counts) * sum(prod(result.shape) for result in results)
    size = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return elements * _PIECES_ARE_SLOWER <= windows or size <= CHUNK_BYTES


def is_foldable(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    """Whether an equation of constants can be run while the function is traced."""
    small = all(value.array.size <= _MAX_FOLDED for value in values)
    return (
        small
        and all(value.is_constant for value in values)
        and not any(isinstance(value.array, jax.core.Tracer) for value in values)
        and all(prod(shape) <= _MAX_FOLDED for shape in out_shapes(eqn))
    )
