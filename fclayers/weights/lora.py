"""LoRA: a weight with a trainable adapter of low rank."""

from collections.abc import Iterator
from itertools import count
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Key, PyTree

from fclayers._util.checks import check_key
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.initial import draw, symmetric_uniform
from fclayers._util.reprs import short_repr
from fclayers._util.trees import Select
from fclayers.kernels.windows import Geometry
from fclayers.weights.form import (
    Shape,
    Term,
    Weight,
    WeightForm,
    as_matrix,
    axes,
    compute_dtype,
    convolve,
    dense,
    replace_weights,
    shapes,
    terms,
)
from fclayers.weights.lowrank import (
    check_rank,
    convolve_factors,
    factors_shapes,
    narrow,
    product,
)


class Lora(NamedTuple):
    """A weight with an adapter, `base + scale · down up`; made by `add_lora`.

    Attributes:
        base: A weight of any other form.
        down: Array of shape `(*in, rank)`.
        up: Array of shape `(rank, *out)`.
        scale: Scalar, `alpha / rank`.
    """

    base: Weight
    down: Inexact[Array, "*in rank"]
    up: Inexact[Array, "rank *out"]
    scale: Inexact[Array, ""]

    def __repr__(self) -> str:
        return short_repr(self)


@public
def add_lora(
    key: Key[Array, ""],
    params: PyTree,
    *,
    rank: int,
    alpha: float,
    select: Select | None = None,
) -> PyTree:
    """Adds trainable adapters to weights; the outputs are unchanged until they are trained.

    Args:
        key: A key from `jax.random.key`.
        params: A layer, or any tree with layers in it.
        rank: Rank of the adapters.
        alpha: The adapter's output is multiplied by `alpha / rank`.
        select: A predicate on the path of a layer, such as `"classifier.0"`. Default: all layers.

    Returns:
        The tree with `Lora` weights in the selected layers: `down` uniform on ±1/√fan-in, `up`
        zero, in the dtype of the weight.

    Raises:
        TypeError: `key` is not a random key, or a selected weight has an adapter.
        ValueError: The rank is larger than a matrix, or no layer is selected.

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 10)
        >>> fc.add_lora(jax.random.key(1), layer, rank=4, alpha=8).weight
        Lora(base=f32[64,10], down=f32[64,4], up=f32[4,10], scale=f32[])

    Source: `Hu et al. 2021, LoRA <https://arxiv.org/abs/2106.09685>`_.
    """
    check_key(key)
    keys = _keys(key)

    def adapt(name: str, weight: Weight, in_ndim: int) -> Lora:
        if isinstance(weight, Lora):
            raise BadType(f"{name} has an adapter; materialize it first")
        in_shape, out_shape = shapes(weight, in_ndim)
        check_rank(name, rank, in_shape + out_shape, in_ndim)
        dtype = compute_dtype(weight)
        fan_in = prod(in_shape)
        down = draw(symmetric_uniform(fan_in=fan_in), next(keys), (fan_in, rank), dtype)
        return Lora(
            weight,
            down.reshape(*in_shape, rank),
            jnp.zeros((rank, *out_shape), dtype),
            jnp.asarray(alpha / rank, dtype),
        )

    return replace_weights(params, select, adapt)


def lora_mask(params: PyTree) -> PyTree:
    """Marks the arrays of adapters, for training only those.

    Args:
        params: Any tree of parameters.

    Returns:
        The same tree of booleans: true for `down` and `up` of every `Lora`, else false. To train
        only those, `optax.partition({True: optimizer, False: optax.set_to_zero()}, mask)`.
        (`optax.masked` alone passes the gradients of the others through unchanged.)

    Example:
        >>> import jax
        >>> import fclayers as fc
        >>> layer = fc.init_linear(jax.random.key(0), 64, 10)
        >>> fc.lora_mask(fc.add_lora(jax.random.key(1), layer, rank=4, alpha=8)).weight
        Lora(base=False, down=True, up=True, scale=False)
    """

    def mark(node: PyTree) -> PyTree:
        frozen = jax.tree.map(lambda _: False, node)
        return frozen._replace(down=True, up=True) if isinstance(node, Lora) else frozen

    return jax.tree.map(mark, params, is_leaf=lambda node: isinstance(node, Lora))


def _keys(key: Array) -> Iterator[Array]:
    """An infinite sequence of keys; the first keys do not depend on the number of layers."""
    return (jax.random.fold_in(key, number) for number in count())


def _shapes(weight: Lora, in_ndim: int | None) -> tuple[Shape, Shape]:
    adapter = factors_shapes(weight.down, weight.up)
    base = shapes(weight.base, len(adapter[0]))
    if adapter != base:
        raise BadValue(
            f"the adapter maps {adapter[0]} to {adapter[1]}, but its base maps {base[0]} to "
            f"{base[1]}"
        )
    return base


def _axes(weight: Lora, in_ndim: int) -> Lora:
    base = axes(weight.base, in_ndim)
    down, up = "in " * (weight.down.ndim - 1) + "rank", "rank" + " out" * (weight.up.ndim - 1)
    return Lora(base, down, up, "")  # type: ignore[arg-type]


def _dense(weight: Lora, in_ndim: int) -> Array:
    base = dense(weight.base, in_ndim)
    scale = weight.scale.astype(jnp.result_type(weight.scale, jnp.float32))
    return (base + scale * product(weight.down, weight.up)).astype(base.dtype)


def _terms(weight: Lora, x: Array, in_ndim: int, precision: lax.PrecisionLike) -> tuple[Term, ...]:
    features = weight.scale.astype(x.dtype) * narrow(weight.down, x, precision)
    adapter = (features, as_matrix(weight.up, 1))
    return (*terms(weight.base, x, in_ndim, precision), adapter)


def _convolve(weight: Lora, x: Array, geometry: Geometry, precision: lax.PrecisionLike) -> Array:
    y = convolve(weight.base, x, geometry, 1, precision)
    up = weight.scale.astype(weight.up.dtype) * weight.up
    return y + convolve_factors(weight.down, up, x, geometry, precision)


FORM = WeightForm(
    shapes=_shapes,
    axes=_axes,
    dense=_dense,
    terms=_terms,
    convolve=_convolve,
)
