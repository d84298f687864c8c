"""The interpreter: runs a jaxpr of one window on values of all windows.

A step that no rule can share is deferred, and so is every step that needs its result. The deferred
steps whose results are returned are run window by window.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from fclayers.sliding.calls import CALL_RULES, called_jaxpr, has_shareable_derivative
from fclayers.sliding.checks import check_operands, check_results, empty_results
from fclayers.sliding.equations import AnyJaxpr, aval, bind, open_jaxpr, out_shapes, source_line
from fclayers.sliding.layout import position_single_elements
from fclayers.sliding.rules import RULES
from fclayers.sliding.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    constant,
    make_value,
    over_positions,
    whole,
)


class Deferred:
    """The result of a deferred step."""


Result = Value | Deferred


class DeferredStep(NamedTuple):
    """An equation to run window by window."""

    eqn: JaxprEqn
    inputs: Sequence[Result]
    results: Sequence[Deferred]


class Step(NamedTuple):
    """What became of an equation: shared, per position, per window (and why), or a constant.

    `eqns` are the equation and the calls around it, the innermost first.
    """

    eqns: tuple[JaxprEqn, ...]
    kind: str
    shape: tuple[int, ...]
    reason: str = ""


class Trace:
    """What a run has deferred, and what became of every equation."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.deferred: list[DeferredStep] = []
        self.steps: list[Step] = []
        self.callers: tuple[JaxprEqn, ...] = ()


def interpret(trace: Trace, jaxpr: AnyJaxpr, inputs: Sequence[Result]) -> list[Result]:
    """Runs a jaxpr; the results that cannot be shared are deferred."""
    jaxpr, consts = open_jaxpr(jaxpr)
    env: dict[Var, Result] = {}
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Var | Literal) -> Result:
        if isinstance(atom, Literal):
            return constant(jnp.asarray(atom.val, aval(atom).dtype))
        return env[atom]

    for eqn in jaxpr.eqns:
        results = _run(trace, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(trace: Trace, eqn: JaxprEqn, inputs: list[Result]) -> Sequence[Result]:
    name = eqn.primitive.name
    called, first = called_jaxpr(eqn)
    if called is not None:
        return _run_call(trace, eqn, called, inputs[first:])
    empty = empty_results(eqn)
    if empty:
        return _note(trace, eqn, "constant", empty)
    values = [value for value in inputs if isinstance(value, Value)]
    try:
        if len(values) < len(inputs):
            raise Unshared("needs a result that is computed window by window")
        if all(value.is_constant for value in values):
            return _note(trace, eqn, "constant", _run_constant(trace.grid, eqn, values))
        if not any(atom.axis is not None for value in values for atom in value.atoms):
            return _note(trace, eqn, "per position", _run_per_position(eqn, values))
        if name == "custom_jvp_call" and not has_shareable_derivative(eqn, values):
            return _run_call(trace, eqn, eqn.params["call_jaxpr"], values)
        return _note(trace, eqn, "shared", _run_shared(trace.grid, eqn, values))
    except Unshared as unshared:
        reason = str(unshared)
    except Exception as error:
        reason = _warn(trace, eqn, error)
    results = [Deferred() for _ in eqn.outvars]
    trace.deferred.append(DeferredStep(eqn, inputs, results))
    return _note(trace, eqn, "per window", results, reason)


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
    kind: str,
    results: Sequence[Result],
    reason: str = "",
) -> Sequence[Result]:
    first = results[0] if results else None
    shapes = [first.array.shape] if isinstance(first, Value) else out_shapes(eqn)
    trace.steps.append(Step((eqn, *trace.callers), kind, shapes[0] if shapes else (), reason))
    return results


def _run_constant(grid: Grid, eqn: JaxprEqn, values: list[Value]) -> Sequence[Value]:
    """By its rule, which remembers what is uniform, or else unchanged."""
    if eqn.primitive.name in RULES:
        try:
            return _run_shared(grid, eqn, values)
        except Unshared:
            pass
    return _run_per_position(eqn, values)


def _run_per_position(eqn: JaxprEqn, values: list[Value]) -> Sequence[Value]:
    """Unchanged, mapped over the position axes."""
    results, positions = over_positions(lambda *arrays: bind(eqn, *arrays), *map(whole, values))
    return [
        make_value(array, [Atom(size) for size in shape], positions)
        for array, shape in zip(results, out_shapes(eqn), strict=True)
    ]


def _run_shared(grid: Grid, eqn: JaxprEqn, values: list[Value]) -> Sequence[Value]:
    name = eqn.primitive.name

    def run(jaxpr: AnyJaxpr, values: Sequence[Value]) -> list[Value]:
        trace = Trace(grid)
        outs = interpret(trace, jaxpr, values)
        if trace.deferred:
            raise Unshared(next(step.reason for step in trace.steps if step.reason))
        return [out for out in outs if isinstance(out, Value)]

    if name not in CALL_RULES and name not in RULES:
        raise Unshared(f"there is no rule for {name}")
    check_operands(eqn, values)
    if name in CALL_RULES:
        return check_results(grid, eqn, CALL_RULES[name](grid, run, eqn, *values))
    positions = {axis for value in values for axis in value.positions}
    values = [position_single_elements(grid, value, positions) for value in values]
    results = RULES[name](grid, eqn, *values)
    return check_results(grid, eqn, [results] if isinstance(results, Value) else results)
