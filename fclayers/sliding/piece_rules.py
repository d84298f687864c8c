"""The table of rules for values in pieces: functions `(grid, eqn, *values)`, like the other table.

They run the rules of the other table on blocks, and make pieces where a rule for whole values can
share nothing.
"""

from collections.abc import Callable
from typing import Any

from jax.extend.core import JaxprEqn

from fclayers.sliding import resample
from fclayers.sliding.elementwise import elementwise as of_values
from fclayers.sliding.piece_joins import concatenate, pad, split
from fclayers.sliding.piece_products import dot_general, reduction
from fclayers.sliding.piece_shapes import (
    along,
    broadcast_in_dim,
    elementwise,
    gather,
    reshape_rule,
    rev,
    slice_rule,
    transpose,
)
from fclayers.sliding.piece_windows import conv, reduce_window
from fclayers.sliding.pieces import Pieces
from fclayers.sliding.rules import RULES
from fclayers.sliding.values import Grid, Unshared

PieceRule = Callable[..., Any]


def _either(first: PieceRule, second: PieceRule) -> PieceRule:
    """The first rule that can share something."""

    def rule(grid: Grid, eqn: JaxprEqn, *values: Pieces) -> Any:
        try:
            return first(grid, eqn, *values)
        except Unshared:
            return second(grid, eqn, *values)

    return rule


PIECE_RULES: dict[str, PieceRule] = {
    name: elementwise for name, rule in RULES.items() if rule is of_values
} | {
    "argmax": along("axes"),
    "argmin": along("axes"),
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "conv_general_dilated": conv,
    "cumlogsumexp": along("axis"),
    "cummax": along("axis"),
    "cummin": along("axis"),
    "cumprod": along("axis"),
    "cumsum": along("axis"),
    "dot_general": _either(resample.product, dot_general),
    "gather": _either(resample.pick, gather),
    "pad": pad,
    "reduce_max": reduction,
    "reduce_min": reduction,
    "reduce_sum": reduction,
    "reduce_window": reduce_window,
    "reduce_window_max": reduce_window,
    "reduce_window_min": reduce_window,
    "reduce_window_sum": reduce_window,
    "reshape": reshape_rule,
    "rev": rev,
    "slice": slice_rule,
    "sort": along("dimension"),
    "split": split,
    "squeeze": reshape_rule,
    "top_k": along("axis"),
    "transpose": transpose,
}
