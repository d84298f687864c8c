"""Pools over one, two or three spatial axes, channels last."""

from math import prod
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Num

from fclayers._util.checks import check_array, check_sizes
from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.jit import jit
from fclayers.kernels.pooling import Pool, reduce_windows
from fclayers.kernels.windows import Geometry, Padding, make_geometry, positions


@jit("window_shape", "stride", "padding", "dilation")
def max_pool(
    x: Num[Array, "*batch_and_spatial channels"],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
) -> Num[Array, "*batch_and_positions channels"]:
    """Takes the maximum of every window; padding does not count.

    Args:
        x: Input of shape `(*batch, *spatial, channels)`, any number of batch axes.
        window_shape: Size of the window, one entry per spatial axis (one to three).
        stride: Step of the window. Default: the window, so that windows do not overlap.
        padding: As in `apply_conv`. PyTorch's `ceil_mode` is padding after the last window.
        dilation: Distance of the elements of a window.

    Returns:
        Array of shape `(*batch, *positions, channels)` and the dtype of `x`. The gradient goes to
        the first maximum of a window, as in PyTorch.

    Raises:
        TypeError: `x` is not an array.
        ValueError: The window is larger than the padded map, or an argument does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> fc.max_pool(jnp.ones((8, 28, 28, 16)), (2, 2)).shape
        (8, 14, 14, 16)
    """
    check_array("x", x)
    geometry = _pool_geometry(x, window_shape, stride, padding, dilation)
    return _reduce_windows(x, "max", geometry)


@jit("window_shape", "stride", "padding", "dilation", "count_include_pad")
def avg_pool(
    x: Num[Array, "*batch_and_spatial channels"],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
    dilation: int | tuple[int, ...] = 1,
    count_include_pad: bool = True,
) -> Inexact[Array, "*batch_and_positions channels"]:
    """Takes the mean of every window.

    Args:
        x: Input of shape `(*batch, *spatial, channels)`, any number of batch axes.
        window_shape: As in `max_pool`.
        stride: As in `max_pool`.
        padding: As in `apply_conv`.
        dilation: As in `max_pool`.
        count_include_pad: Whether padding counts as zeros. Without, a window at the border is the
            mean of what lies inside the map.

    Returns:
        Array of shape `(*batch, *positions, channels)`; integers become floats. Half precision is
        summed in float32.

    Raises:
        TypeError: `x` is not an array.
        ValueError: The window is larger than the padded map, or an argument does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> fc.avg_pool(jnp.ones((8, 28, 28, 16)), (7, 7)).shape
        (8, 4, 4, 16)
    """
    check_array("x", x)
    geometry = _pool_geometry(x, window_shape, stride, padding, dilation)
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    dtype = x.dtype if inexact else jnp.result_type(x.dtype, jnp.float32)
    x = x.astype(accumulation_dtype(dtype) or dtype)
    total = _reduce_windows(x, "sum", geometry)
    if count_include_pad:
        return (total / prod(geometry.kernel)).astype(dtype)
    spatial = x.shape[x.ndim - len(geometry.kernel) - 1 : -1]
    return (total / _counts(spatial, geometry).astype(total.dtype)).astype(dtype)


def _pool_geometry(
    x: Array,
    window_shape: tuple[int, ...],
    stride: int | tuple[int, ...] | None,
    padding: Padding,
    dilation: int | tuple[int, ...],
) -> Geometry:
    kernel = check_sizes("window_shape", window_shape)
    return make_geometry(x.shape, kernel, kernel if stride is None else stride, padding, dilation)


def _reduce_windows(x: Array, kind: Literal["max", "sum"], geometry: Geometry) -> Array:
    """Reduces every window of `(*batch, *spatial, C)`."""
    batch_ndim = x.ndim - len(geometry.kernel) - 1
    ones, no_padding = (1,) * batch_ndim, ((0, 0),) * batch_ndim
    kernel, strides, padding, dilations = geometry
    pool = Pool(
        (*ones, *kernel, 1),
        (*ones, *strides, 1),
        (*no_padding, *padding, (0, 0)),
        (*ones, *dilations, 1),
    )
    return reduce_windows(x, kind, pool)


def _counts(spatial: tuple[int, ...], geometry: Geometry) -> np.ndarray:
    """The number of elements of each window inside the map, `(*positions, 1)`."""
    counts = np.ones(())
    for size, k, s, pair, d in zip(spatial, *geometry, strict=True):
        (count,) = positions((size,), Geometry((k,), (s,), (pair,), (d,)))
        places = np.arange(count)[:, None] * s + np.arange(k) * d - pair[0]
        counts = counts[..., None] * ((places >= 0) & (places < size)).sum(1)
    return counts[..., None]
