"""The interpreter: runs a jaxpr of one window on values of all windows.

A step that no rule can share is deferred, and so is every step that needs its result. The deferred
steps whose results are returned are run window by window.
"""

import warnings
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple, cast

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array

from fclayers._util.jaxprs import AnyJaxpr, aval, called_jaxpr, open_jaxpr, out_shapes, source_line
from fclayers.sliding.calls import CALL_RULES, has_shareable_derivative
from fclayers.sliding.checks import check_operands, check_shapes, empty_results
from fclayers.sliding.costs import count_operations, run_if_worth_sharing
from fclayers.sliding.equations import padding_of, with_python_integers
from fclayers.sliding.piece_rules import PIECE_RULES
from fclayers.sliding.pieces import (
    Pieces,
    arrays_of,
    as_value,
    describe_borders,
    in_pieces,
    varies_inside,
)
from fclayers.sliding.resample import repeats
from fclayers.sliding.run_rule import run_rule
from fclayers.sliding.values import Grid, Unshared, Value, constant


class Deferred:
    """The result of a deferred step."""


Shared = Value | Pieces
Result = Shared | Deferred


class DeferredStep(NamedTuple):
    """An equation to run window by window."""

    eqn: JaxprEqn
    inputs: Sequence[Result]
    results: Sequence[Deferred]


class Step(NamedTuple):
    """What became of an equation, in the report's words, and why if it is not shared.

    `eqns` are the equation and the calls around it, the innermost first.
    """

    eqns: tuple[JaxprEqn, ...]
    kind: str
    shape: tuple[int, ...]
    operations: float
    operations_of_windows: float
    bytes: int
    bytes_in_pieces: int
    reason: str = ""


class Trace:
    """What a run has deferred, and what became of every equation.

    One that is differentiated `keeps_backward_passes` of `jax.custom_vjp`, window by window.
    `reach` is how many pixels beyond a window its padding reads, along each window axis.
    """

    def __init__(self, grid: Grid, *, keeps_backward_passes: bool = False) -> None:
        self.grid = grid
        self.keeps_backward_passes = keeps_backward_passes
        self.deferred: list[DeferredStep] = []
        self.steps: list[Step] = []
        self.callers: tuple[JaxprEqn, ...] = ()
        self.reach = [(0, 0)] * len(grid.window)

    def inside(self, grid: Grid | None = None) -> "Trace":
        """For a function within the function, or the same one on fewer windows."""
        trace = Trace(grid or self.grid, keeps_backward_passes=self.keeps_backward_passes)
        trace.reach = self.reach
        return trace


def interpret(trace: Trace, jaxpr: AnyJaxpr, inputs: Sequence[Result]) -> list[Result]:
    """Runs a jaxpr; the results that cannot be shared are deferred."""
    jaxpr, consts = open_jaxpr(jaxpr)
    env: dict[Var, Result] = {}
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Var | Literal) -> Result:
        if isinstance(atom, Literal):
            return constant(np.asarray(atom.val, aval(atom).dtype))
        return env[atom]

    for eqn in jaxpr.eqns:
        results = _run(trace, with_python_integers(eqn), [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(trace: Trace, eqn: JaxprEqn, inputs: list[Result]) -> Sequence[Result]:
    called, first = called_jaxpr(eqn)
    if called is not None:
        return _run_call(trace, eqn, called, inputs[first:])
    empty = empty_results(eqn)
    if empty:
        return _note(trace, eqn, [], empty)
    values = [value for value in inputs if not isinstance(value, Deferred)]
    try:
        if len(values) < len(inputs):
            raise Unshared("needs a result that is computed window by window")
        if _is_plain_call(trace, eqn, values):
            return _run_call(trace, eqn, eqn.params["call_jaxpr"], values)
        return _note(trace, eqn, values, _run_shared(trace, eqn, values))
    except Unshared as unshared:
        reason = str(unshared)
    except Exception as error:
        reason = _warn(trace, eqn, error)
    results = [Deferred() for _ in eqn.outvars]
    trace.deferred.append(DeferredStep(eqn, inputs, results))
    return _note(trace, eqn, inputs, results, reason)


def _is_plain_call(trace: Trace, eqn: JaxprEqn, values: Sequence[Shared]) -> bool:
    """Whether a function with a derivative of its own may be run as if it had none."""
    if eqn.primitive.name == "custom_jvp_call":
        return not has_shareable_derivative(eqn, values)
    return eqn.primitive.name == "custom_vjp_call" and not trace.keeps_backward_passes


def _warn(trace: Trace, eqn: JaxprEqn, error: Exception) -> str:
    """A fault of a rule costs time, not the result."""
    warnings.warn(
        f"{source_line((eqn, *trace.callers))}: slide runs {eqn.primitive.name} window by window, "
        f"because its rule failed: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "has a rule that failed"


def _run_call(
    trace: Trace, eqn: JaxprEqn, jaxpr: AnyJaxpr, inputs: Sequence[Result]
) -> Sequence[Result]:
    outside = trace.callers
    trace.callers = (eqn, *outside)
    results = interpret(trace, jaxpr, inputs)
    trace.callers = outside
    return results


def _note(
    trace: Trace,
    eqn: JaxprEqn,
    inputs: Sequence[Result],
    results: Sequence[Result],
    reason: str = "",
) -> Sequence[Result]:
    first = results[0] if results else None
    shapes = [first.array.shape] if isinstance(first, Value) else out_shapes(eqn)
    kind = _kind_of_step(eqn, inputs, results)
    if trace.grid.pads_image and inputs and isinstance(inputs[0], Value):
        _note_reach(trace, eqn, inputs[0])
    ours, windows = (
        (0.0, 0.0) if kind == "constant" else count_operations(trace.grid, eqn, inputs, results)
    )
    arrays = [value.array for value in results if isinstance(value, Value)]
    bordered = _bytes(arrays_of([value for value in results if isinstance(value, Pieces)]))
    size = bordered + (0 if kind == "constant" else _bytes(arrays))
    shape = shapes[0] if shapes else ()
    trace.steps.append(
        Step((eqn, *trace.callers), kind, shape, ours, windows, size, bordered, reason)
    )
    return results


def _bytes(arrays: Sequence[Array]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _note_reach(trace: Trace, eqn: JaxprEqn, value: Value) -> None:
    for dim, (low, high) in padding_of(eqn).items():
        for atom in value.dims[dim]:
            if atom.axis is not None:
                before, after = trace.reach[atom.axis]
                more = ceil(max(low, 0) * atom.pitch), ceil(max(high, 0) * atom.pitch)
                trace.reach[atom.axis] = (before + more[0], after + more[1])


def _kind_of_step(eqn: JaxprEqn, inputs: Sequence[Result], results: Sequence[Result]) -> str:
    """In the words of the report."""
    for result in results:
        if isinstance(result, Deferred):
            return "per window"
        if isinstance(result, Pieces):
            return describe_borders(result)
    if all(isinstance(value, Value) and value.is_constant for value in inputs):
        return "constant"
    contracts = eqn.primitive.name.startswith(("reduce_", "arg", "dot_general"))
    if any(map(varies_inside, results)) or (contracts and any(map(varies_inside, inputs))):
        return "shared"
    return "per position"


def _run_shared(trace: Trace, eqn: JaxprEqn, values: Sequence[Shared]) -> Sequence[Shared]:
    grid, name = trace.grid, eqn.primitive.name

    def run(jaxpr: AnyJaxpr, values: Sequence[Shared]) -> list[Shared]:
        inside = trace.inside()
        outs = interpret(inside, jaxpr, values)
        if inside.deferred:
            raise Unshared(next(step.reason for step in inside.steps if step.reason))
        return [out for out in outs if not isinstance(out, Deferred)]

    if name in CALL_RULES and any(map(varies_inside, values)):
        check_operands(eqn, [value.shape for value in values])
        return CALL_RULES[name](grid, run, eqn, *values)
    whole = [value for value in values if isinstance(value, Value)]
    if len(whole) < len(values) or repeats(eqn, values):
        return _run_in_pieces(grid, eqn, values)
    try:
        return cast("list[Shared]", run_rule(grid, eqn, *whole))
    except Unshared as unshared:
        reason = unshared
    try:
        return _run_in_pieces(grid, eqn, values)
    except Unshared as borders:
        raise (borders if padding_of(eqn) else reason) from None


def _run_in_pieces(grid: Grid, eqn: JaxprEqn, values: Sequence[Shared]) -> Sequence[Shared]:
    if eqn.primitive.name not in PIECE_RULES:
        raise Unshared(f"there is no rule for {eqn.primitive.name} on values in pieces")
    check_operands(eqn, [value.shape for value in values])
    rule = PIECE_RULES[eqn.primitive.name]

    def run(values: Sequence[Pieces]) -> list[Pieces]:
        results = rule(grid, eqn, *values)
        return results if isinstance(results, list) else [results]

    results = run_if_worth_sharing(grid, run, [in_pieces(value) for value in values])
    check_shapes(eqn, [result.shape for result in results])
    return [as_value(result) for result in results]
