"""What a step costs in pieces, and window by window."""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxpr_as_fun
from jaxtyping import Array

from fclayers._util.jaxprs import aval, out_shapes
from fclayers.sliding.pieces import Pieces, arrays_of, map_blocks
from fclayers.sliding.values import Grid, Unshared, Value

# All windows of a step at once are no larger than a chunk of windows.
CHUNK_BYTES = 2**26
# Elements in pieces take more time than those of windows in batches.
_PIECES_ARE_SLOWER = 1.5
# Primitives that compute nothing.
_MOVES = """
    broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice gather iota pad
    reshape rev slice split squeeze stack stop_gradient transpose
"""


def run_if_worth_sharing(
    grid: Grid, rule: Callable[[Sequence[Pieces]], list[Pieces]], operands: Sequence[Pieces]
) -> list[Pieces]:
    """The results of a rule, if they have far fewer elements than those of all windows.

    The rule is traced to find out, and what it traced is run, since tracing it again takes long.
    """
    found: list[Pieces] = []

    def run(varying: Sequence[Array]) -> list[Array]:
        rest = iter(varying)
        found[:] = rule([_with_varying(value, rest) for value in operands])
        return [array for array in arrays_of(found) if isinstance(array, jax.core.Tracer)]

    varying = [
        block.array for p in operands for block in p.blocks.values() if not block.is_constant
    ]
    jaxpr = jax.make_jaxpr(run)(varying)
    if not _is_worth_sharing(grid, operands, found):
        raise Unshared("has borders that meet inside the window")
    computed = iter(jaxpr_as_fun(jaxpr)(*varying))
    return [
        map_blocks(
            lambda block: (
                block._replace(array=next(computed))
                if isinstance(block.array, jax.core.Tracer)
                else block
            ),
            value,
        )
        for value in found
    ]


def count_operations(
    grid: Grid, eqn: JaxprEqn, inputs: Sequence[object], results: Sequence[object]
) -> tuple[float, float]:
    """Operations of a step on all windows, as it is run, and window by window."""
    one = _count_for_one(eqn)
    shared = [value for value in results if isinstance(value, (Value, Pieces))]
    size = sum(prod(shape) for shape in out_shapes(eqn))
    windows = one * prod(grid.counts)
    if not shared or not size:
        return windows, windows
    computed = sum(array.size for array in arrays_of(shared))
    if isinstance(inputs[0], Value) and eqn.primitive.name.startswith("reduce_"):
        # Window axes are reduced one after the other.
        atoms = [a for i in eqn.params.get("axes", ()) for a in inputs[0].dims[i]]
        sizes = [atom.size for atom in atoms if atom.axis is not None]
        one *= sum(sizes) / prod(sizes) if sizes else 1
    return one * computed / size, windows


def _with_varying(value: Pieces, arrays: Iterator[Array]) -> Pieces:
    """Other arrays for all blocks but constants, whose numbers a rule may ask for."""
    return map_blocks(
        lambda block: block if block.is_constant else block._replace(array=next(arrays)), value
    )


def _is_worth_sharing(grid: Grid, operands: Sequence[Pieces], results: Sequence[Pieces]) -> bool:
    made = arrays_of(results)
    if sum(array.size * array.dtype.itemsize for array in made) <= CHUNK_BYTES:
        return True
    # A reduction works on its operands.
    reads, writes = (sum(prod(p.shape) for p in values) for values in (operands, results))
    touched = arrays_of(operands) if reads > 2 * writes else made
    elements = sum(array.size for array in touched)
    windows = prod(grid.counts) * (reads if reads > 2 * writes else writes)
    return bool(elements * _PIECES_ARE_SLOWER <= windows)


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
