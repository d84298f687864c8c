"""Low rank: the product of two narrow matrices."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Inexact, PyTree

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue, public
from fclayers._util.reprs import short_repr
from fclayers._util.trees import Select
from fclayers.kernels.convolution import convolve
from fclayers.kernels.product import matrix_product
from fclayers.kernels.windows import Geometry
from fclayers.weights.form import Shape, Term, Weight, WeightForm, as_matrix, replace_weights
from fclayers.weights.plain import plain_matrix


class LowRank(NamedTuple):
    """A weight that is the product of two narrow matrices; made by `low_rank`.

    Attributes:
        down: Array of shape `(*in, rank)`.
        up: Array of shape `(rank, *out)`.
    """

    down: Inexact[Array, "*in rank"]
    up: Inexact[Array, "rank *out"]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def low_rank(
    params: PyTree,
    *,
    rank: int | None = None,
    energy: float | None = None,
    select: Select | None = None,
) -> PyTree:
    """Replaces weights by their nearest approximations of low rank.

    Args:
        params: A layer, or any tree with layers in it.
        rank: Rank of the new weights.
        energy: Instead of a rank, the share in (0, 1] of the sum of squares of a weight's singular
            values that its rank keeps, the smallest that suffices: the relative squared error is
            at most `1 - energy`. Requires concrete values.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with `LowRank` weights in the selected layers. `reconstruction_error` gives the
        error.

    Raises:
        ValueError: Not exactly one of `rank` and `energy` is given or it is out of range, the rank
            is larger than a matrix, no layer is selected, or a weight is not finite.
        TypeError: A selected weight is not an array.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 4096, 1000)
        >>> jax.eval_shape(lambda: fc.low_rank(layer, rank=64)).weight
        LowRank(down=f32[4096,64], up=f32[64,1000])

    Source: truncated SVD of fully connected layers, section 3.1 of
    `Girshick 2015, Fast R-CNN <https://arxiv.org/abs/1504.08083>`_.
    """
    if (rank is None) == (energy is None):
        raise BadValue(f"give either rank or energy, got {rank=} and {energy=}")
    if energy is not None and not 0 < energy <= 1:
        raise BadValue(f"energy must be in (0, 1], got {energy}")

    def factor(name: str, weight: Weight, in_ndim: int) -> LowRank:
        matrix = plain_matrix(name, weight, in_ndim)
        if rank is not None:
            check_rank(name, rank, weight.shape, in_ndim)
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        kept = _sufficient_rank(s, energy) if energy is not None else rank
        root = jnp.sqrt(s[:kept])
        down, up = u[:, :kept] * root, root[:, None] * vt[:kept]
        return LowRank(
            down.reshape(*weight.shape[:in_ndim], kept).astype(weight.dtype),
            up.reshape(kept, *weight.shape[in_ndim:]).astype(weight.dtype),
        )

    return replace_weights(params, select, factor)


def check_rank(name: str, rank: int, shape: Shape, in_ndim: int) -> None:
    """Raises unless a matrix `(*in, *out)` can have an approximation of this rank."""
    largest = min(prod(shape[:in_ndim]), prod(shape[in_ndim:]))
    if not 1 <= check_count("rank", rank) <= largest:
        raise BadValue(
            f"rank must be from 1 to {largest} for {name}, whose weight has shape {shape}, "
            f"got {rank}"
        )


def factors_shapes(down: Array, up: Array) -> tuple[Shape, Shape]:
    """The shapes of inputs and outputs of a product; raises unless the ranks agree."""
    if not down.ndim or not up.ndim or down.shape[-1] != up.shape[0]:
        raise BadValue(
            f"expected down (*in, rank) and up (rank, *out), got shapes {down.shape} and {up.shape}"
        )
    return down.shape[:-1], up.shape[1:]


def narrow(down: Array, x: Array, precision: lax.PrecisionLike) -> Array:
    """The inner features of rows `(*batch, fan_in)`."""
    matrix = as_matrix(down.astype(x.dtype), down.ndim - 1)
    return matrix_product(x, matrix, precision).astype(x.dtype)


def product(down: Array, up: Array) -> Array:
    """Down · up in full precision, at least float32."""
    matrix = matrix_product(down, as_matrix(up, 1), lax.Precision.HIGHEST)
    return matrix.reshape(*down.shape[:-1], *up.shape[1:])


def convolve_factors(
    down: Array, up: Array, x: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    """The convolution with the kernel `down`, and `up` at every position."""
    y = convolve(x, down.astype(x.dtype), geometry, 1, precision).astype(x.dtype)
    return matrix_product(y, up.astype(x.dtype), precision)


def _sufficient_rank(s: Array, energy: float) -> int:
    """The smallest rank that keeps this share of the sum of squares, at least 1."""
    left = np.cumsum(np.asarray(s, np.float64)[::-1] ** 2)[::-1]
    return max(1, int(np.sum(left > (1 - energy) * left[0]))) if len(left) else 0


def _terms(
    weight: LowRank, x: Array, in_ndim: int, precision: lax.PrecisionLike
) -> tuple[Term, ...]:
    return ((narrow(weight.down, x, precision), as_matrix(weight.up, 1)),)


FORM = WeightForm(
    shapes=lambda weight, in_ndim: factors_shapes(*weight),
    axes=lambda weight, in_ndim: LowRank(
        "in " * (weight.down.ndim - 1) + "rank", "rank" + " out" * (weight.up.ndim - 1)
    ),
    dense=lambda weight, in_ndim: product(*weight).astype(weight.down.dtype),
    terms=_terms,
    convolve=lambda weight, x, geometry, precision: convolve_factors(
        weight.down, weight.up, x, geometry, precision
    ),
)
