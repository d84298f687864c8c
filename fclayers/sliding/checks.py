"""What a rule may be asked, and what it must give back, so that no fault of one goes unseen."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from fclayers._util.jaxprs import aval, out_shapes
from fclayers.sliding.values import Grid, Unshared, Value, axis_of, constant, step

_POOL = "window_dimensions window_strides padding base_dilation window_dilation"

# The parameters that the rules know. A primitive that JAX gives another one may do something else.
_PARAMETERS = {
    name: set(parameters.split())
    for name, parameters in {
        "argmax": "axes index_dtype",
        "argmin": "axes index_dtype",
        "broadcast_in_dim": "shape broadcast_dimensions",
        "concatenate": "dimension",
        "conj": "input_dtype",
        "conv_general_dilated": """
            window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count
            batch_group_count precision preferred_element_type
        """,
        "convert_element_type": "new_dtype weak_type",
        "cumlogsumexp": "axis reverse",
        "cummax": "axis reverse",
        "cummin": "axis reverse",
        "cumprod": "axis reverse",
        "cumsum": "axis reverse",
        "custom_jvp_call": "call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros",
        "custom_vjp_call": "call_jaxpr fwd_jaxpr_thunk bwd num_consts out_trees symbolic_zeros",
        "dot_general": "dimension_numbers precision preferred_element_type",
        "dynamic_slice": "slice_sizes",
        "gather": """
            dimension_numbers slice_sizes unique_indices indices_are_sorted mode fill_value
        """,
        "integer_pow": "y",
        "iota": "shape dimension dtype",
        "mul": "out_dtype",
        "pad": "padding_config",
        "reduce_max": "axes",
        "reduce_min": "axes",
        "reduce_precision": "exponent_bits mantissa_bits",
        "reduce_sum": "axes",
        "reduce_window": f"{_POOL} jaxpr consts",
        "reduce_window_max": _POOL,
        "reduce_window_min": _POOL,
        "reduce_window_sum": _POOL,
        "reshape": "new_sizes dimensions",
        "rev": "dimensions",
        "round": "rounding_method",
        "scan": """
            length reverse jaxpr num_consts num_carry ft_in ft_out unroll linear _split_transpose
        """,
        "slice": "start_indices limit_indices strides",
        "sort": "dimension is_stable num_keys",
        "split": "sizes axis",
        "squeeze": "dimensions",
        "stack": "axis",
        "top_k": "k axis is_stable",
        "transpose": "permutation",
    }.items()
}


def check_operands(eqn: JaxprEqn, shapes: Sequence[tuple[int, ...]]) -> None:
    """Declines parameters that the rule does not know, and operands without elements."""
    name = eqn.primitive.name
    known = _PARAMETERS.get(name, set()) | {"accuracy"}  # of functions of single elements
    # A sharding, an axis that is unnamed and the like do nothing where they are `None`.
    unknown = [key for key, value in eqn.params.items() if key not in known and value is not None]
    if unknown:
        raise Unshared(f"has parameters unknown to the rule of {name}: {', '.join(unknown)}")
    if name != "concatenate" and any(0 in shape for shape in shapes):
        raise Unshared("takes an array without elements")


def empty_results(eqn: JaxprEqn) -> list[Value]:
    """The results of an equation if none of them has elements."""
    avals = [aval(var) for var in eqn.outvars]
    if any(0 not in result.shape or _is_extended(result.dtype) for result in avals):
        return []
    return [constant(np.zeros(result.shape, result.dtype)) for result in avals]


def check_results(grid: Grid, eqn: JaxprEqn, results: Sequence[Value]) -> list[Value]:
    """The results, if they are laid out as values are; those without elements as constants."""
    checked = []
    for result, shape, var in zip(results, out_shapes(eqn), eqn.outvars, strict=True):
        dtype = aval(var).dtype
        if 0 in shape and not _is_extended(dtype):
            checked.append(constant(np.zeros(shape, dtype)))
            continue
        if result.shape != shape or result.array.dtype != dtype:
            raise ValueError(
                f"expected {dtype}{shape}, got {result.array.dtype}{result.shape} of all windows"
            )
        if not _is_laid_out(grid, result):
            raise ValueError(f"an array of {result.array.shape} does not hold {result.dims}")
        checked.append(result)
    return checked


def check_shapes(eqn: JaxprEqn, shapes: Sequence[tuple[int, ...]]) -> None:
    """Of results that are not laid out as values are."""
    if list(shapes) != out_shapes(eqn):
        raise ValueError(f"expected results of shapes {out_shapes(eqn)}, got {list(shapes)}")


def _is_laid_out(grid: Grid, value: Value) -> bool:
    axes = [*value.positions, *(atom.axis for atom in value.atoms if atom.axis is not None)]
    if len(set(axes)) < len(axes) or value.array.ndim != len(value.positions) + len(value.atoms):
        return False
    if value.leading != tuple(grid.counts[axis] for axis in value.positions):
        return False
    for atom, length in zip(value.atoms, value.lengths, strict=True):
        if atom.axis is None:
            fits = length == (1 if atom.uniform else atom.size)
        else:
            span = (grid.counts[axis_of(atom)] - 1) * grid.stride[axis_of(atom)]
            fits = length > (span + (atom.size - 1) * atom.pitch) // step(grid, atom)
        if not fits:
            return False
    return True


def _is_extended(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.extended)
