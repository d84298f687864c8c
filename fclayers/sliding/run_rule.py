"""Runs an equation on values, by its rule or mapped over positions."""

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod

from jax.extend.core import JaxprEqn

from fclayers._util.jaxprs import bind, out_shapes
from fclayers.sliding.checks import check_operands, check_results
from fclayers.sliding.layout import fuse, position_single_elements
from fclayers.sliding.phases import over_phases
from fclayers.sliding.rules import RULES
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    make_value,
    over_positions,
    while_tracing,
    whole,
)

# Larger constants are computed by the program.
_MAX_FOLDED = 2**16


@over_phases
def run_rule(grid: Grid, eqn: JaxprEqn, *values: Value) -> list[Value]:
    """Runs an equation on values; small constants are computed while the function is traced."""
    with (
        while_tracing(*(value.array for value in values))
        if _is_small(eqn, values)
        else nullcontext()
    ):
        return _run_rule(grid, eqn, values)


def _run_rule(grid: Grid, eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    if not any(atom.axis is not None for value in values for atom in value.atoms):
        return _run_without_windows(grid, eqn, values)
    if eqn.primitive.name not in RULES:
        raise Unshared(f"there is no rule for {eqn.primitive.name}")
    positions = {axis for value in values for axis in value.positions}
    values = tuple(position_single_elements(grid, value, positions) for value in values)
    try:
        return _apply(grid, eqn, values)
    except Unshared:
        fused = tuple(fuse(grid, value) for value in values)
        if [value.dims for value in fused] == [value.dims for value in values]:
            raise
        return _apply(grid, eqn, fused)


def _apply(grid: Grid, eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    check_operands(eqn, [value.shape for value in values])
    results = RULES[eqn.primitive.name](grid, eqn, *values)
    return check_results(grid, eqn, [results] if isinstance(results, Value) else results)


def _is_small(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    """Whether operands and results are small constants."""
    sizes = [*(value.array.size for value in values), *map(prod, out_shapes(eqn))]
    return all(value.is_constant for value in values) and max(sizes) <= _MAX_FOLDED


def _run_without_windows(grid: Grid, eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Unchanged, mapped over positions.

    Constants by their rule, which knows what is uniform, and convolutions, which may be tiny.
    """
    by_rule = eqn.primitive.name == "conv_general_dilated" or all(v.is_constant for v in values)
    if eqn.primitive.name in RULES and by_rule:
        try:
            return _apply(grid, eqn, values)
        except Unshared:
            pass
    arrays, positions = over_positions(lambda *arrays: bind(eqn, *arrays), *map(whole, values))
    start = len(positions)
    return [make_value(a, [Atom(size) for size in a.shape[start:]], positions) for a in arrays]
