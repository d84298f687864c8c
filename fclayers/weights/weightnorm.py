"""Weight normalization: a direction and the norm of every column."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PyTree

from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.reprs import short_repr
from fclayers._util.trees import Select
from fclayers.kernels.windows import Geometry
from fclayers.weights.form import (
    Shape,
    Weight,
    WeightForm,
    axes,
    convolve,
    dense,
    multiply,
    replace_weights,
    shapes,
)
from fclayers.weights.plain import wide


class WeightNorm(NamedTuple):
    """A weight with separate norms of its columns, `magnitude · direction / ‖direction‖`.

    The norm is taken over the inputs, for every output. Made by `weight_norm`.

    Attributes:
        direction: A weight of any other form. With a `Lora` weight, the layer is DoRA's.
        magnitude: Array of shape `(*out)`.
    """

    direction: Weight
    magnitude: Inexact[Array, "*out"]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def weight_norm(params: PyTree, *, select: Select | None = None) -> PyTree:
    """Separates the norms of the columns of weights from their directions.

    The outputs are unchanged up to rounding. `weight_norm` of `Lora` weights is DoRA.

    Args:
        params: A layer, or any tree with layers in it.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with `WeightNorm` weights in the selected layers.

    Raises:
        TypeError: A selected weight is normalized already.
        ValueError: No layer is selected.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 10)
        >>> fc.weight_norm(layer).weight
        WeightNorm(direction=f32[64,10], magnitude=f32[10])
        >>> dora = fc.weight_norm(fc.add_lora(jax.random.key(1), layer, rank=4, alpha=8))
        >>> type(dora.weight.direction).__name__
        'Lora'

    Source: `Salimans and Kingma 2016 <https://arxiv.org/abs/1602.07868>`_;
    `Liu et al. 2024, DoRA <https://arxiv.org/abs/2402.09353>`_.
    """

    def normalize(name: str, weight: Weight, in_ndim: int) -> WeightNorm:
        if isinstance(weight, WeightNorm):
            raise BadType(f"the weight of {name} is normalized already")
        array = dense(weight, in_ndim)
        return WeightNorm(weight, jnp.sqrt(_sum_of_squares(array, in_ndim)).astype(array.dtype))

    return replace_weights(params, select, normalize)


def _sum_of_squares(array: Array, in_ndim: int) -> Array:
    """Over the inputs, at least in float32."""
    return (jnp.abs(array.astype(wide(array.dtype))) ** 2).sum(tuple(range(in_ndim)))


def _gain(weight: WeightNorm, in_ndim: int) -> Array:
    """What the columns of the direction are multiplied by; columns of zeros stay zero."""
    squares = _sum_of_squares(dense(weight.direction, in_ndim), in_ndim)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return weight.magnitude.astype(wide(weight.magnitude.dtype)) / norms


def _shapes(weight: WeightNorm, in_ndim: int | None) -> tuple[Shape, Shape]:
    ndim = sum(map(len, shapes(weight.direction)))
    in_shape, out_shape = shapes(weight.direction, max(ndim - weight.magnitude.ndim, 0))
    if weight.magnitude.shape != out_shape:
        raise BadValue(
            f"expected the magnitude of WeightNorm to have the outputs {out_shape} of its "
            f"direction, got shape {weight.magnitude.shape}"
        )
    return in_shape, out_shape


def _axes(weight: WeightNorm, in_ndim: int) -> WeightNorm:
    return WeightNorm(axes(weight.direction, in_ndim), "out " * weight.magnitude.ndim)  # type: ignore[arg-type]


def _dense(weight: WeightNorm, in_ndim: int) -> Array:
    array = dense(weight.direction, in_ndim)
    return (array * _gain(weight, in_ndim)).astype(array.dtype)


def _multiply(weight: WeightNorm, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    y = multiply(weight.direction, x, in_ndim, precision)
    return y * _gain(weight, in_ndim).ravel().astype(y.dtype)


def _convolve(
    weight: WeightNorm, x: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    y = convolve(weight.direction, x, geometry, 1, precision)
    return y * _gain(weight, len(geometry.kernel) + 1).astype(y.dtype)


FORM = WeightForm(
    shapes=_shapes,
    axes=_axes,
    dense=_dense,
    multiply=_multiply,
    convolve=_convolve,
)
