"""Rules for functions within the function: calls, custom derivatives and scans.

Besides the grid and the equation, they take `run`, which runs a jaxpr on values and raises
`Unshared` if one of its steps cannot be shared.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from fclayers._util.jaxprs import AnyJaxpr, scan_counts
from fclayers.sliding.pieces import Pieces, arrays_of, layout, with_arrays
from fclayers.sliding.regions import run as run_lax
from fclayers.sliding.values import Grid, Unshared, Value, constant

Shared = Value | Pieces
Run = Callable[[AnyJaxpr, Sequence[Shared]], list[Shared]]

# Scans over layers are unrolled; longer ones are run window by window.
_MAX_SCAN_LENGTH = 256


def has_shareable_derivative(eqn: JaxprEqn, values: Sequence[Shared]) -> bool:
    """Whether the derivative of a `jax.custom_jvp` may be run like the function."""
    floating = all(jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays_of(values))
    return floating and not (eqn.params["symbolic_zeros"] or eqn.params["num_consts"])


def custom_jvp(grid: Grid, run: Run, eqn: JaxprEqn, *values: Shared) -> list[Shared]:
    """Keeps the function's own derivative, where it can be shared like the function."""
    call, rule_of = eqn.params["call_jaxpr"], eqn.params["jvp_jaxpr_fun"].call_wrapped
    outs: list[Shared] = []

    def primal(*arrays: Array) -> list[Array]:
        outs[:] = run(call, with_arrays(values, arrays))
        return arrays_of(outs)

    def rule(
        primals: Sequence[Array], tangents: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        jaxpr, consts, zeros = rule_of(*[False] * len(values))
        arguments = with_arrays([*values, *values], [*primals, *tangents])
        try:
            results = run(jaxpr, [*map(constant, consts), *arguments])
            primals_out, rest = results[: len(zeros)], iter(results[len(zeros) :])
            tangents_out = [
                tangent
                for out, zero in zip(primals_out, zeros, strict=True)
                for tangent in (
                    map(jnp.zeros_like, arrays_of([out])) if zero else _laid_out_as(out, next(rest))
                )
            ]
        except Unshared:
            return jax.jvp(primal, primals, tangents)
        return arrays_of(primals_out), tangents_out

    function = jax.custom_jvp(primal)
    function.defjvp(rule)
    inputs = arrays_of(values)
    # Finds the layout of the results; under differentiation only the rule is called.
    jax.eval_shape(primal, *inputs)
    arrays = function(*inputs)
    return with_arrays(outs, arrays)


def custom_vjp(grid: Grid, run: Run, eqn: JaxprEqn, *values: Shared) -> list[Shared]:
    """For functions that are differentiated; the others are plain calls."""
    raise Unshared("has a backward pass of its own (jax.custom_vjp)")


def scan(grid: Grid, run: Run, eqn: JaxprEqn, *values: Shared) -> list[Shared]:
    """Unrolled."""
    length, body = eqn.params["length"], eqn.params["jaxpr"]
    if not 0 < length <= _MAX_SCAN_LENGTH:
        raise Unshared(f"is a scan of no or more than {_MAX_SCAN_LENGTH} steps")
    first_carry, num_carry = scan_counts(eqn)
    consts, carry = values[:first_carry], list(values[first_carry : first_carry + num_carry])
    collected = []
    for i in range(length)[:: -1 if eqn.params["reverse"] else 1]:
        xs = [_pick(grid, value, i) for value in values[first_carry + num_carry :]]
        outs = run(body, [*consts, *carry, *xs])
        carry = outs[:num_carry]
        collected.append(outs[num_carry:])
    if eqn.params["reverse"]:
        collected.reverse()
    return [*carry, *(_stack(grid, column) for column in zip(*collected, strict=True))]


def _laid_out_as(value: Shared, other: Shared) -> list[Array]:
    """The other value's arrays, if it is laid out in the same way."""
    if layout(value) != layout(other):
        raise Unshared("has a tangent that lies differently in the window")
    return arrays_of([other])


def _pick(grid: Grid, value: Shared, i: int) -> Shared:
    """One element along the first dimension."""
    if isinstance(value, Pieces) or any(atom.axis is not None for atom in value.dims[0]):
        raise Unshared("scans along the window")
    return run_lax(grid, lax.index_in_dim, value, index=i, keepdims=False)


def _stack(grid: Grid, values: Sequence[Shared]) -> Shared:
    whole = [value for value in values if isinstance(value, Value)]
    if len(whole) < len(values):
        raise Unshared("stacks values in pieces")
    return run_lax(grid, lambda *x: jnp.stack(x), *whole)


CALL_RULES = {"custom_jvp_call": custom_jvp, "custom_vjp_call": custom_vjp, "scan": scan}
