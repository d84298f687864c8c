"""The geometry of the windows of convolutions and pools, and slices by tap."""

import operator
from typing import Literal, NamedTuple

import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers._util.checks import check_count
from fclayers._util.errors import BadValue

Pairs = tuple[tuple[int, int], ...]
Padding = Literal["VALID", "SAME"] | int | Pairs


class Geometry(NamedTuple):
    """The geometry of a window, per spatial axis; padding as pairs."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pairs
    dilations: tuple[int, ...]


def make_geometry(
    x_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: Padding,
    dilation: int | tuple[int, ...],
) -> Geometry:
    ndim = len(kernel)
    if len(x_shape) < ndim + 1:
        raise BadValue(
            f"a window of shape {kernel} needs x of shape (*batch, *spatial, channels) "
            f"with {ndim} spatial axes, got shape {x_shape}"
        )
    strides = per_axis("stride", stride, ndim)
    dilations = per_axis("dilation", dilation, ndim)
    spatial = x_shape[len(x_shape) - ndim - 1 : -1]
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    pairs = _padding_pairs(padding, spatial, reach, strides)
    padded = tuple(size + sum(pair) for size, pair in zip(spatial, pairs, strict=True))
    if any(size < r for size, r in zip(padded, reach, strict=True)):
        raise BadValue(
            f"a window that reaches over {reach} does not fit into the map of shape "
            f"{spatial}, padded {padded}"
        )
    return Geometry(kernel, strides, pairs, dilations)


def positions(spatial: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    return tuple(
        (size + sum(pair) - (k - 1) * d - 1) // s + 1
        for size, k, s, pair, d in zip(spatial, *geometry, strict=True)
    )


def taps(x: Array, i: int, geometry: Geometry) -> list[Array]:
    """For every tap of the window along spatial axis `i`, its inputs at all positions."""
    kernel, stride, dilation = geometry.kernel[i], geometry.strides[i], geometry.dilations[i]
    span = (x.shape[1 + i] - (kernel - 1) * dilation - 1) // stride * stride + 1
    starts = range(0, kernel * dilation, dilation)
    return [lax.slice_in_dim(x, start, start + span, stride, axis=1 + i) for start in starts]


def pad(x: Array, padding: Pairs, value: float) -> Array:
    """Pads the spatial axes of `(N, *spatial, channels)`."""
    config = [(0, 0, 0), *((*pair, 0) for pair in padding), (0, 0, 0)]
    return lax.pad(x, np.array(value, x.dtype), config)


def per_axis(name: str, value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,) * ndim
    if len(values) != ndim or any(check_count(name, entry) < 1 for entry in values):
        raise BadValue(
            f"{name} must be an integer >= 1 or one per spatial axis ({ndim}), got {value}"
        )
    return tuple(map(operator.index, values))


def _padding_pairs(
    padding: Padding,
    spatial: tuple[int, ...],
    reach: tuple[int, ...],
    strides: tuple[int, ...],
) -> Pairs:
    if padding == "VALID" or padding == "SAME":
        return tuple(lax.padtype_to_pads(spatial, reach, strides, padding))
    pairs = ((padding, padding),) * len(spatial) if isinstance(padding, int) else padding
    try:
        checked = tuple((operator.index(pair[0]), operator.index(pair[1])) for pair in pairs)
    except (TypeError, IndexError):
        checked = ()
    if len(checked) != len(spatial) or any(side < 0 for pair in checked for side in pair):
        raise BadValue(
            f"padding must be 'VALID', 'SAME', an integer >= 0 or a pair "
            f"(before, after) for each of the {len(spatial)} spatial axes, got {padding!r}"
        )
    return checked
