"""The interpreter: runs a jaxpr of one window on values of all windows.

A step that no rule can share is put off, and so is all that needs its result. What is left in the
end is run window by window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fclayers.slide.elementwise import bind
from fclayers.slide.rules import RULES
from fclayers.slide.values import (
    Atom,
    Grid,
    Unshared,
    Value,
    align,
    constant,
    dense,
    make_value,
    over_positions,
    per_dim,
    position_single_elements,
    whole,
)

# Scans over layers are unrolled; longer ones are run window by window.
_MAX_SCAN_LENGTH = 256


class Late:
    """The result of a step that was put off."""


class Step(NamedTuple):
    """What became of an equation: shared, per position, per window (and why), or a constant.

    `eqns` are the equation and the calls around it, the innermost first.
    """

    eqns: tuple[Any, ...]
    kind: str
    shape: tuple[int, ...]
    reason: str = ""


class Trace:
    """What a run has put off, and what became of every equation."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.put_off: list[tuple[Any, list[Value | Late], list[Late]]] = []
        self.steps: list[Step] = []
        self.callers: tuple[Any, ...] = ()


def interpret(trace: Trace, jaxpr: Any, inputs: Sequence[Value | Late]) -> list[Value | Late]:
    """Runs a jaxpr, closed or without constants."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, Value | Late] = {}
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value | Late:
        return constant(atom.val) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        results = _run(trace, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(trace: Trace, eqn: Any, inputs: list[Value | Late]) -> Sequence[Value | Late]:
    name = eqn.primitive.name
    if name in _CALLS:
        return _run_call(trace, eqn, eqn.params[_CALLS[name]], inputs)
    if name == "cond" and eqn.params.get("branches_platforms"):
        # Formulations for one platform hide what is computed; the default does not.
        default = eqn.params["branches_platforms"].index(None)
        return _run_call(trace, eqn, eqn.params["branches"][default], inputs[1:])
    values = [value for value in inputs if isinstance(value, Value)]
    try:
        if len(values) < len(inputs):
            raise Unshared("needs a result that is computed window by window")
        if all(value.is_constant for value in values):
            return _note(trace, eqn, "constant", _run_constant(trace.grid, eqn, values))
        if not any(atom.axis is not None for value in values for atom in value.atoms):
            return _note(trace, eqn, "per position", _run_per_position(eqn, values))
        if name in _HIGHER_ORDER:
            return _HIGHER_ORDER[name](trace, eqn, values)
        if name not in RULES:
            raise Unshared(f"there is no rule for {name}")
        return _note(trace, eqn, "shared", _run_shared(trace.grid, eqn, values))
    except Unshared as reason:
        results = [Late() for _ in eqn.outvars]
        trace.put_off.append((eqn, inputs, results))
        return _note(trace, eqn, "per window", results, str(reason))


def _run_call(
    trace: Trace, eqn: Any, jaxpr: Any, inputs: Sequence[Value | Late]
) -> Sequence[Value | Late]:
    outside = trace.callers
    trace.callers = (eqn, *outside)
    results = interpret(trace, jaxpr, inputs)
    trace.callers = outside
    return results


def _note(
    trace: Trace, eqn: Any, kind: str, results: Sequence[Any], reason: str = ""
) -> Sequence[Any]:
    first = results[0] if results else None
    shape = first.array.shape if isinstance(first, Value) else eqn.outvars[0].aval.shape
    trace.steps.append(Step((eqn, *trace.callers), kind, shape, reason))
    return results


def _run_constant(grid: Grid, eqn: Any, values: list[Value]) -> Sequence[Value]:
    """By its rule, which remembers what is uniform, or as it is."""
    if eqn.primitive.name in RULES:
        try:
            return _run_shared(grid, eqn, values)
        except Unshared:
            pass
    return _run_per_position(eqn, values)


def _run_per_position(eqn: Any, values: list[Value]) -> Sequence[Value]:
    """As it is, mapped over the position axes."""
    results, positions = over_positions(lambda *arrays: bind(eqn, *arrays), *map(whole, values))
    if not eqn.primitive.multiple_results:
        results = [results]
    return [
        make_value(array, [Atom(size) for size in var.aval.shape], positions)
        for array, var in zip(results, eqn.outvars, strict=True)
    ]


def _run_shared(grid: Grid, eqn: Any, values: list[Value]) -> Sequence[Value]:
    positions = {axis for value in values for axis in value.positions}
    values = [position_single_elements(grid, value, tuple(positions)) for value in values]
    results = RULES[eqn.primitive.name](grid, eqn, *values)
    return [results] if isinstance(results, Value) else results


# Functions within the function, and the parameter that holds their jaxpr.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


def _run_custom_jvp(trace: Trace, eqn: Any, values: list[Value]) -> Sequence[Value | Late]:
    """Keeps the function's own derivative, where that can be shared like the function."""
    call, rule_of = eqn.params["call_jaxpr"], eqn.params["jvp_jaxpr_fun"].call_wrapped
    floating = all(jnp.issubdtype(value.array.dtype, jnp.inexact) for value in values)
    if eqn.params["symbolic_zeros"] or eqn.params["num_consts"] or not floating:
        return _run_call(trace, eqn, call, values)
    outs: list[Value] = []

    def primal(*arrays: Array) -> list[Array]:
        outs[:] = _interpret_shared(trace.grid, call, _with_arrays(values, arrays))
        return [out.array for out in outs]

    def rule(primals: Sequence[Array], tangents: Sequence[Array]) -> Any:
        jaxpr, consts, zeros = rule_of(*[False] * len(primals))
        arguments = _with_arrays([*values, *values], [*primals, *tangents])
        try:
            results = _interpret_shared(trace.grid, jaxpr, [*map(constant, consts), *arguments])
            primals_out, rest = results[: len(zeros)], iter(results[len(zeros) :])
            tangents_out = [
                jnp.zeros_like(out.array) if zero else _laid_out_as(out, next(rest))
                for out, zero in zip(primals_out, zeros, strict=True)
            ]
        except Unshared:
            return jax.jvp(primal, primals, tangents)
        return [out.array for out in primals_out], tangents_out

    function = jax.custom_jvp(primal)
    function.defjvp(rule)
    inputs = [value.array for value in values]
    # How the results are laid out; under differentiation only the rule is called.
    jax.eval_shape(primal, *inputs)
    arrays = function(*inputs)
    return _note(trace, eqn, "shared", _with_arrays(outs, arrays))


def _interpret_shared(grid: Grid, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
    trace = Trace(grid)
    outs = interpret(trace, jaxpr, values)
    if trace.put_off:
        raise Unshared(next(step.reason for step in trace.steps if step.reason))
    return [out for out in outs if isinstance(out, Value)]


def _laid_out_as(value: Value, other: Value) -> Array:
    """The other value's array, if it is laid out in the same way."""
    if (value.dims, value.positions) != (other.dims, other.positions):
        raise Unshared("has a tangent that lies differently in the window")
    return other.array


def _with_arrays(values: Sequence[Value], arrays: Sequence[Array]) -> list[Value]:
    return [value._replace(array=array) for value, array in zip(values, arrays, strict=True)]


def _run_scan(trace: Trace, eqn: Any, values: list[Value]) -> Sequence[Value | Late]:
    """Unrolled, one call after the other."""
    length, body = eqn.params["length"], eqn.params["jaxpr"]
    if length > _MAX_SCAN_LENGTH:
        raise Unshared(f"is a scan of more than {_MAX_SCAN_LENGTH} steps")
    # What is scanned or stacked has one axis more outside than inside.
    inner = getattr(body, "jaxpr", body)
    scanned = [
        outside.aval.ndim > inside.aval.ndim
        for outside, inside in zip(eqn.invars, inner.invars, strict=True)
    ]
    num_carry = sum(
        outside.aval.ndim == inside.aval.ndim
        for outside, inside in zip(eqn.outvars, inner.outvars, strict=True)
    )
    first_carry = scanned.count(False) - num_carry
    consts, carry = values[:first_carry], values[first_carry : first_carry + num_carry]
    collected = []
    for i in range(length)[:: -1 if eqn.params["reverse"] else 1]:
        xs = [_pick(value, i) for value in values[first_carry + num_carry :]]
        outs = _interpret_shared(trace.grid, body, [*consts, *carry, *xs])
        carry = outs[:num_carry]
        collected.append(outs[num_carry:])
    if eqn.params["reverse"]:
        collected.reverse()
    ys = [_stack(trace.grid, column) for column in zip(*collected, strict=True)]
    return _note(trace, eqn, "shared", [*carry, *ys])


def _pick(value: Value, i: int) -> Value:
    """One element along the first dimension."""
    value = dense(per_dim(value)[0])
    if value.atoms[0].axis is not None:
        raise Unshared("scans along the window")
    array = lax.index_in_dim(value.array, i, len(value.positions), keepdims=False)
    return make_value(array, value.atoms[1:], value.positions)


def _stack(grid: Grid, values: Sequence[Value]) -> Value:
    fitted = [dense(per_dim(value)[0]) for value in align(grid, values)]
    array, positions = over_positions(lambda *arrays: jnp.stack(arrays), *fitted)
    return make_value(array, [Atom(len(values)), *fitted[0].atoms], positions)


def _run_custom_vjp(trace: Trace, eqn: Any, values: list[Value]) -> Sequence[Value | Late]:
    """A backward pass need not be linear, and gets the sum over windows if it is shared."""
    raise Unshared("has a backward pass of its own (jax.custom_vjp)")


_HIGHER_ORDER = {
    "custom_jvp_call": _run_custom_jvp,
    "custom_vjp_call": _run_custom_vjp,
    "scan": _run_scan,
}
