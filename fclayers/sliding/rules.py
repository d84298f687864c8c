"""The table of rules: one per primitive, a function `(grid, eqn, *values)` of its operands."""

from collections.abc import Callable

from fclayers.sliding.elementwise import elementwise
from fclayers.sliding.products import dot_general
from fclayers.sliding.shapes import (
    along,
    broadcast_in_dim,
    concatenate,
    dynamic_slice,
    gather,
    iota,
    pad,
    reshape_rule,
    slice_rule,
    split,
    stack,
    transpose,
)
from fclayers.sliding.values import Value
from fclayers.sliding.windows import conv, reduce_window, reduction

Rule = Callable[..., Value | list[Value]]

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1
    floor ge gt imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul
    ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor
"""

RULES: dict[str, Rule] = dict.fromkeys(_ELEMENTWISE.split(), elementwise) | {
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
    "dot_general": dot_general,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
    "iota": iota,
    "pad": pad,
    "reduce_max": reduction("max"),
    "reduce_min": reduction("min"),
    "reduce_sum": reduction("sum"),
    "reduce_window": reduce_window,
    "reduce_window_max": reduce_window,
    "reduce_window_min": reduce_window,
    "reduce_window_sum": reduce_window,
    "reshape": reshape_rule,
    "rev": along("dimensions"),
    "slice": slice_rule,
    "sort": along("dimension"),
    "split": split,
    "stack": stack,
    "squeeze": reshape_rule,
    "top_k": along("axis"),
    "transpose": transpose,
}
