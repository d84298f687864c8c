"""Arrays as weights, and the conversion of other forms to arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.trees import Select
from fclayers.weights.form import Weight, as_matrix, dense, is_array, replace_weights


@public
def materialize(params: PyTree, *, select: Select | None = None) -> PyTree:
    """Replaces weights of any form by the arrays that they stand for.

    Args:
        params: A layer, or any tree with layers in it.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with arrays `(*in, *out)` as the weights of the selected layers. Adapters are added
        to their base, and integers multiplied by their scales.

    Raises:
        ValueError: No layer is selected.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> int8 = fc.quantize(fc.init_linear(jax.random.key(0), 64, 10))
        >>> fc.materialize(int8)
        LinearParams(weight=f32[64,10], bias=f32[10])
    """
    return replace_weights(params, select, lambda _, weight, in_ndim: dense(weight, in_ndim))


def plain_matrix(name: str, weight: Weight, in_ndim: int) -> Array:
    """A finite array as a matrix, at least in float32; raises for any other form."""
    if not is_array(weight):
        raise BadType(
            f"expected the weight of {name} to be an array, it is {type(weight).__name__}; "
            "materialize it first"
        )
    if not isinstance(weight, jax.core.Tracer) and not np.isfinite(np.asarray(weight)).all():
        raise BadValue(f"the weight of {name} has infinities or NaNs")
    return as_matrix(weight, in_ndim).astype(wide(weight.dtype))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which factors and scales are computed."""
    return jnp.promote_types(dtype, jnp.float32)
