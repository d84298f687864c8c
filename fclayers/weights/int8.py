"""8-bit integers: values times a scale per output and block of inputs."""

from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact, PyTree
from jaxtyping import Int8 as Int8Array

from fclayers._util.checks import check_count, describe
from fclayers._util.errors import BadValue, public
from fclayers._util.reprs import short_repr
from fclayers._util.trees import Select
from fclayers.kernels.convolution import quantized_convolve
from fclayers.kernels.int8 import dequantized, quantized_product
from fclayers.weights.form import Shape, Term, Weight, WeightForm, as_matrix, replace_weights
from fclayers.weights.plain import plain_matrix


class Int8(NamedTuple):
    """A weight in 8-bit integers, `values · scale`; made by `quantize`.

    Attributes:
        values: int8 array of shape `(*in, *out)`, from -127 to 127.
        scale: Array of shape `(blocks, *out)`: one number for every output and block of consecutive
            inputs (of all inputs, flattened, if `blocks` is 1).
    """

    values: Int8Array[Array, "*in_and_out"]
    scale: Inexact[Array, "blocks *out"]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def quantize(
    params: PyTree, *, block_size: int | None = None, select: Select | None = None
) -> PyTree:
    """Rounds weights to 8-bit integers times a scale.

    Args:
        params: A layer, or any tree with layers in it.
        block_size: Number of consecutive inputs (of the weight's input axes, flattened) that share
            a scale; it must divide their number. Default: all inputs of an output share one.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with `Int8` weights in the selected layers; the scale has the weight's dtype. No
        weight is off by more than half its scale, which is the largest absolute value of those
        that share it over 127, rounded up.

    Raises:
        TypeError: A selected weight is not an array.
        ValueError: `block_size` does not divide the inputs, a weight is complex or, unless it is
            traced, not finite, or no layer is selected.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> fc.quantize(fc.init_linear(jax.random.key(0), 4096, 1000), block_size=64).weight
        Int8(values=i8[4096,1000], scale=f32[64,1000])

    Source: symmetric absolute-maximum quantization, section 2.1 of
    `Dettmers et al. 2022, LLM.int8() <https://arxiv.org/abs/2208.07339>`_.
    """
    if block_size is not None and check_count("block_size", block_size) < 1:
        raise BadValue(f"block_size must be at least 1, got {block_size}")

    def to_int8(name: str, weight: Weight, in_ndim: int) -> Int8:
        matrix = plain_matrix(name, weight, in_ndim)
        fan_in, fan_out = matrix.shape
        if jnp.iscomplexobj(matrix):
            raise BadValue(f"the weight of {name} is complex")
        if fan_in % (block_size or 1):
            raise BadValue(
                f"block_size={block_size} does not divide the {fan_in} inputs of {name}, whose "
                f"weight has shape {weight.shape}"
            )
        blocks = fan_in // block_size if block_size else 1
        values, scale = _round_blocks(matrix.reshape(blocks, fan_in // blocks, fan_out), weight)
        scale = scale.reshape(blocks, *weight.shape[in_ndim:])
        return Int8(values.reshape(weight.shape), scale)

    return replace_weights(params, select, to_int8)


@jax.jit
def _round_blocks(
    matrix: Float[Array, "blocks size out"], like: Inexact[Array, "..."]
) -> tuple[Array, Array]:
    """The nearest multiples of a scale per block and output, and the scales."""
    largest = jnp.abs(matrix).max(1, initial=0)
    # A smaller step would be flushed to zero.
    step = jnp.maximum(largest / 127, np.finfo(matrix.dtype).tiny)
    scale = _round_up(jnp.where(largest > 0, step, 0), like.dtype)
    divisor = jnp.where(scale > 0, scale, 1).astype(matrix.dtype)
    return jnp.round(matrix / divisor[:, None]).clip(-127, 127).astype(jnp.int8), scale


def _round_up(values: Array, dtype: DTypeLike) -> Array:
    """Rounds to `dtype`, never down."""
    rounded = values.astype(dtype)
    return jnp.where(rounded < values, jnp.nextafter(rounded, jnp.asarray(jnp.inf, dtype)), rounded)


def _shapes(weight: Int8, in_ndim: int | None) -> tuple[Shape, Shape]:
    values, scale = weight
    split = max(values.ndim - scale.ndim + 1, 0)
    in_shape, out_shape = values.shape[:split], values.shape[split:]
    if values.dtype != jnp.int8 or scale.shape[1:] != out_shape:
        raise BadValue(
            f"expected Int8 with int8 values (*in, *out) and scale (blocks, *out), "
            f"got {describe(values)} and {describe(scale)}"
        )
    blocks = scale.shape[0] if scale.ndim else 0
    if blocks == 0 or prod(in_shape) % blocks:
        raise BadValue(
            f"the scale of Int8 has {blocks} blocks, which do not divide the {prod(in_shape)} "
            f"inputs of values of shape {values.shape}"
        )
    return in_shape, out_shape


def _axes(weight: Int8, in_ndim: int) -> Int8:
    out = " out" * (weight.scale.ndim - 1)
    return Int8("in " * (weight.values.ndim - weight.scale.ndim + 1) + out, "block" + out)  # type: ignore[arg-type]


def _flat(weight: Int8) -> Int8:
    in_ndim = weight.values.ndim - weight.scale.ndim + 1
    return Int8(as_matrix(weight.values, in_ndim), as_matrix(weight.scale, 1))


def _dense(weight: Int8, in_ndim: int) -> Array:
    return dequantized(*_flat(weight), weight.scale.dtype).reshape(weight.values.shape)


def _multiply(weight: Int8, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> Array:
    return quantized_product(x, *_flat(weight), precision)


def _terms(weight: Int8, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> tuple[Term, ...]:
    return ((x, _flat(weight)),)


FORM = WeightForm(
    shapes=_shapes,
    axes=_axes,
    dense=_dense,
    multiply=_multiply,
    terms=_terms,
    convolve=lambda weight, x, geometry, precision: quantized_convolve(
        x, weight.values, weight.scale, geometry, precision
    ),
)
