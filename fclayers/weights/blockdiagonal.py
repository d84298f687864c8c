"""Block-diagonal weights: each group of outputs depends on one group of inputs."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, PyTree

from fclayers._util.checks import check_count
from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.errors import BadValue, public
from fclayers._util.reprs import short_repr
from fclayers._util.trees import Select
from fclayers.kernels.convolution import convolve
from fclayers.kernels.windows import Geometry
from fclayers.weights.form import Shape, Weight, WeightForm, replace_weights
from fclayers.weights.plain import plain_matrix


class BlockDiagonal(NamedTuple):
    """A weight with zeros outside of the blocks on its diagonal; made by `block_diagonal`.

    The blocks divide the last input axis and the last output axis. A convolution with such a weight
    is a grouped convolution.

    Attributes:
        blocks: Array of shape `(num_blocks, *in, *out)`, whose last input and output axes are
            those of one block.
    """

    blocks: Inexact[Array, "num_blocks *in_and_out"]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def block_diagonal(params: PyTree, *, num_blocks: int, select: Select | None = None) -> PyTree:
    """Replaces weights by the blocks on their diagonals; the other entries are dropped.

    Args:
        params: A layer, or any tree with layers in it.
        num_blocks: Number of blocks; it must divide the last input and the last output axis.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with `BlockDiagonal` weights in the selected layers, the nearest to the original
        ones.

    Raises:
        TypeError: A selected weight is not an array.
        ValueError: `num_blocks` does not divide an axis, a weight is not finite, or no layer is
            selected.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 32)
        >>> fc.block_diagonal(layer, num_blocks=4).weight
        BlockDiagonal(blocks=f32[4,16,8])
    """

    def cut(name: str, weight: Weight, in_ndim: int) -> BlockDiagonal:
        plain_matrix(name, weight, in_ndim)
        if check_count("num_blocks", num_blocks) < 1:
            raise BadValue(f"num_blocks must be at least 1, got {num_blocks}")
        if not 0 < in_ndim < weight.ndim:
            raise BadValue(f"{name} has no input axis or no output axis to divide into blocks")
        divided = weight.shape[in_ndim - 1], weight.shape[-1]
        if any(size % num_blocks for size in divided):
            raise BadValue(
                f"num_blocks={num_blocks} does not divide the {divided[0]} inputs and "
                f"{divided[1]} outputs of {name}"
            )
        return BlockDiagonal(jnp.stack(_diagonal(weight, in_ndim, num_blocks)))

    return replace_weights(params, select, cut)


def from_groups(kernel: Array, groups: int) -> Array:
    """The kernel `(*kernel, in, out)` of a convolution with groups, as one without."""
    split = kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups)
    return _dense(BlockDiagonal(jnp.moveaxis(split, -2, 0)), kernel.ndim - 1)


def _diagonal(weight: Array, in_ndim: int, num_blocks: int) -> list[Array]:
    rows = jnp.split(weight, num_blocks, in_ndim - 1)
    return [jnp.split(row, num_blocks, -1)[i] for i, row in enumerate(rows)]


def _shapes(weight: BlockDiagonal, in_ndim: int | None) -> tuple[Shape, Shape]:
    num_blocks, *block = weight.blocks.shape or (0,)
    split = len(block) - 1 if in_ndim is None else in_ndim
    if not 0 < split < len(block):
        raise BadValue(
            f"expected the blocks of BlockDiagonal to be (num_blocks, *in, *out), "
            f"got shape {weight.blocks.shape}"
        )
    block[split - 1] *= num_blocks
    block[-1] *= num_blocks
    return tuple(block[:split]), tuple(block[split:])


def _dense(weight: BlockDiagonal, in_ndim: int) -> Array:
    blocks = weight.blocks
    num_blocks, out_ndim = len(blocks), blocks.ndim - 1 - in_ndim
    diagonal = jnp.eye(num_blocks, dtype=bool)
    diagonal = diagonal.reshape(num_blocks, num_blocks, *(1,) * (blocks.ndim - 1))
    placed = jnp.where(diagonal, blocks[:, None], jnp.zeros((), blocks.dtype))
    placed = jnp.moveaxis(placed, (0, 1), (in_ndim - 1, in_ndim + out_ndim))
    in_shape, out_shape = _shapes(weight, in_ndim)
    return placed.reshape(in_shape + out_shape)


def _multiply(weight: BlockDiagonal, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    num_blocks, *block = weight.blocks.shape
    inner, outer = prod(block[: in_ndim - 1]), prod(block[in_ndim:-1])
    blocks = weight.blocks.reshape(num_blocks, inner, block[in_ndim - 1], outer, block[-1])
    y = jnp.einsum(
        "...pgi,gpiqo->...qgo",
        x.reshape(*x.shape[:-1], inner, num_blocks, block[in_ndim - 1]),
        blocks.astype(x.dtype),
        precision=precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    return y.reshape(*x.shape[:-1], outer * num_blocks * block[-1])


def _convolve(
    weight: BlockDiagonal, x: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    kernel = jnp.moveaxis(weight.blocks.astype(x.dtype), 0, -2)
    kernel = kernel.reshape(*kernel.shape[:-2], -1)
    return convolve(x, kernel, geometry, len(weight.blocks), precision)


FORM = WeightForm(
    shapes=_shapes,
    axes=lambda weight, in_ndim: BlockDiagonal(
        "group " + "in " * in_ndim + "out " * (weight.blocks.ndim - 1 - in_ndim)
    ),
    dense=_dense,
    multiply=_multiply,
    convolve=_convolve,
)
