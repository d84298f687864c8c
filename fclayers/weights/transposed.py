"""Transposed: an array with its outputs first, as embedding tables and PyTorch have it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from fclayers._util.errors import BadValue
from fclayers._util.reprs import short_repr
from fclayers.kernels.product import transposed_product
from fclayers.weights.form import Shape, Term, WeightForm, as_matrix


class Transposed(NamedTuple):
    """A weight that is stored with its outputs first, and read in place.

    A layer whose weight is tied to an embedding table `(classes, features)` is
    `LinearParams(Transposed(table), None)`. No function makes it: it holds the table itself, so
    gradients with respect to the table add up those of both uses.

    Attributes:
        array: Array of shape `(*out, *in)`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> table = jax.random.normal(jax.random.key(0), (50_000, 64))
        >>> def loss(table, tokens, labels):
        ...     head = fc.LinearParams(fc.Transposed(table), None)
        ...     return fc.linear_cross_entropy(head, table[tokens], labels, reduction="mean")
        >>> jax.eval_shape(jax.grad(loss), table, jnp.arange(8), jnp.arange(8)).shape
        (50000, 64)
    """

    array: Inexact[Array, "*out_and_in"]

    def __repr__(self) -> str:
        return short_repr(self)


def _shapes(weight: Transposed, in_ndim: int | None) -> tuple[Shape, Shape]:
    split = _split(weight, in_ndim)
    return weight.array.shape[split:], weight.array.shape[:split]


def _split(weight: Transposed, in_ndim: int | None) -> int:
    """The number of output axes; one, if nothing is known."""
    ndim = weight.array.ndim
    split = min(1, ndim) if in_ndim is None else ndim - in_ndim
    if split < 0:
        raise BadValue(
            f"expected the array of Transposed to be (*out, *in) with {in_ndim} input axes, "
            f"got shape {weight.array.shape}"
        )
    return split


def _axes(weight: Transposed, in_ndim: int) -> Transposed:
    return Transposed("out " * _split(weight, in_ndim) + "in " * in_ndim)  # type: ignore[arg-type]


def _dense(weight: Transposed, in_ndim: int) -> Array:
    split = _split(weight, in_ndim)
    return jnp.moveaxis(weight.array, range(split), range(-split, 0))


def _matrix(weight: Transposed, in_ndim: int) -> Array:
    return as_matrix(weight.array, _split(weight, in_ndim))


def _multiply(weight: Transposed, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    return transposed_product(x, _matrix(weight, in_ndim).astype(x.dtype), precision)


def _terms(
    weight: Transposed, x: Array, in_ndim: int, precision: lax.PrecisionLike
) -> tuple[Term, ...]:
    return ((x, Transposed(_matrix(weight, in_ndim))),)


FORM = WeightForm(shapes=_shapes, axes=_axes, dense=_dense, multiply=_multiply, terms=_terms)
