"""The convolution, in the formulation that is fastest for the shape on CPUs.

XLA's CPU backend multiplies patches of the map by the kernel. If the patches fit into the caches,
slices and one product are faster; for many channels, fewer products, as in Winograd's algorithm;
and for few terms, sums of shifted inputs. Small groups are sums of shifted inputs as well,
differentiated as a few convolutions of merged groups; larger ones are convolved one by one. XLA
materializes all patches over three axes, and over two if nothing is padded: if they are many, tiles
are faster over three axes, and a row of padding over two.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from fclayers._util.dtypes import accumulation_dtype
from fclayers._util.meshes import varying_with
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.grouped import merge_groups, merged_groups
from fclayers.kernels.int8 import dequantized, quantized_product
from fclayers.kernels.product import Tangent, add_bias, matrix_product
from fclayers.kernels.shifted import shifted_convolve, shifted_sums, shifted_sums_win
from fclayers.kernels.windows import Geometry, pad, positions, taps
from fclayers.kernels.winograd import winograd_convolve, winograd_wins

Formulation = Callable[..., Array]


def convolve(
    x: Array,
    weight: Array,
    geometry: Geometry,
    groups: int,
    precision: lax.PrecisionLike,
    bias: Array | None = None,
) -> Array:
    """Convolves `(N, *spatial, in)` with `(*kernel, in // groups, out)`, and adds a bias `(out,)`.

    The result of half precision is in float32.
    """
    wide = jnp.dtype(accumulation_dtype(x.dtype) or x.dtype)

    def on_accelerators(x: Array, weight: Array, bias: Array | None) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            # XLA's GPU backend has no convolution of integers.
            product = partial(_product_of_patches, geometry=geometry, precision=precision)
            y = _group_by_group(product, x, weight, groups)
        else:
            y = _plain(x, weight, geometry, groups, precision).astype(wide)
        return add_bias(y, bias, wide)

    def on_cpu(x: Array, weight: Array, bias: Array | None) -> Array:
        return _fastest(x.astype(wide), weight.astype(wide), geometry, groups, precision, bias)

    y: Array = lax.platform_dependent(x, weight, bias, cpu=on_cpu, default=on_accelerators)
    return y


def _fastest(
    x: Array,
    weight: Array,
    geometry: Geometry,
    groups: int,
    precision: lax.PrecisionLike,
    bias: Array | None = None,
) -> Array:
    """Convolves in the formulation that is fastest on CPUs."""
    plain = partial(_plain, geometry=geometry, groups=groups, precision=precision)
    finish = partial(add_bias, bias=bias, dtype=x.dtype)
    rows = x.shape[0] * prod(positions(x.shape[1:-1], geometry))
    fan_in, fan_out = prod(weight.shape[:-1]), weight.shape[-1]
    if not isinstance(rows, int):  # symbolic in an export
        return finish(plain(x, weight))
    if shifted_sums_win(x.shape, weight.shape, geometry, groups):
        by_sums = partial(shifted_convolve, geometry=geometry, groups=groups)
        differentiated = _derivative_of_sums(weight.shape, geometry, groups, precision)
        return _convolve_by(by_sums, differentiated, x, weight, bias)
    if 1 < groups <= CROSSOVERS.split_groups:
        fastest = partial(_fastest, geometry=geometry, groups=1, precision=precision)
        return finish(_group_by_group(fastest, x, weight, groups))
    if groups > 1:
        return finish(plain(x, weight))
    product = partial(_product_of_patches, geometry=geometry, precision=precision)
    if prod(geometry.kernel) == 1 or rows <= fan_out:
        return product(x, weight, bias=bias)
    patches = rows * fan_in * x.dtype.itemsize
    large, floating = patches > CROSSOVERS.large_patches, x.dtype in (jnp.float32, jnp.float64)
    unpadded = not any(map(any, geometry.padding))
    if large and floating and unpadded and len(geometry.kernel) == 2:
        plain = partial(_with_one_more_row, geometry=geometry, precision=precision)
    if _may_round(x.dtype, precision) and winograd_wins(x.shape, weight.shape, geometry):
        by_winograd = partial(winograd_convolve, geometry=geometry)
        return _convolve_by(by_winograd, plain, x, weight, bias)
    if large and (len(geometry.kernel) > 2 or not floating):
        in_tiles = partial(_in_tiles, geometry=geometry, precision=precision)
        return _convolve_by(in_tiles, plain, x, weight, bias)
    if x.dtype == jnp.float32 and _product_wins(fan_in, fan_out, patches, geometry):
        return _convolve_by(product, plain, x, weight, bias)
    return finish(plain(x, weight))


def quantized_convolve(
    x: Array, weight: Array, scale: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    """Convolves with an 8-bit integer kernel `(*kernel, in, out)` times `(blocks, out)` scales."""
    matrix = weight.reshape(prod(weight.shape[:-1]), weight.shape[-1])

    def at_once(x: Array, matrix: Array, scale: Array) -> Array:
        kernel = dequantized(matrix, scale, x.dtype).reshape(weight.shape)
        return convolve(x, kernel, geometry, 1, precision)

    def product_of_patches(x: Array, matrix: Array, scale: Array) -> Array:
        return quantized_product(_patches(x, geometry), matrix, scale, precision)

    rows = x.shape[0] * prod(positions(x.shape[1:-1], geometry))
    if isinstance(rows, int) and (prod(geometry.kernel) == 1 or rows <= weight.shape[-1]):
        y: Array = lax.platform_dependent(x, matrix, scale, cpu=product_of_patches, default=at_once)
        return y
    return at_once(x, matrix, scale)


def _product_wins(fan_in: int, fan_out: int, patches: int, geometry: Geometry) -> bool:
    """Whether `_product_of_patches` is faster than XLA's convolution.

    XLA gives convolutions that are padded `SAME`, or not at all, to YNNPACK, which runs most of
    them at half the speed of a product.
    """
    reach = [(k - 1) * d for k, d in zip(geometry.kernel, geometry.dilations, strict=True)]
    same = tuple((r // 2, r - r // 2) for r in reach)
    return (
        max(geometry.strides) == 1
        and geometry.padding in (same, ((0, 0),) * len(reach))
        and fan_in <= CROSSOVERS.product_terms
        and fan_out >= CROSSOVERS.product_features
        and CROSSOVERS.least_patches <= patches <= CROSSOVERS.product_patches
    )


def _may_round(dtype: jnp.dtype, precision: lax.PrecisionLike) -> bool:
    """Whether differences of 1e-5 of the largest result are within what was asked for."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return dtype == jnp.float32 and precision in (None, "default", lax.Precision.DEFAULT)


def _plain(
    x: Array, weight: Array, geometry: Geometry, groups: int, precision: lax.PrecisionLike
) -> Array:
    spatial = "DHW"[3 - len(geometry.kernel) :]
    return lax.conv_general_dilated(
        x,
        weight,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilations,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _derivative_of_sums(
    weight_shape: tuple[int, ...], geometry: Geometry, groups: int, precision: lax.PrecisionLike
) -> Formulation:
    """What is faster to differentiate than sums of shifted inputs, if they are not depthwise."""
    if groups == 1:
        return partial(_plain, geometry=geometry, groups=1, precision=precision)
    fewer = merged_groups(weight_shape, groups, CROSSOVERS.merged_channels)
    if weight_shape[-2:] == (1, groups) or fewer > CROSSOVERS.split_groups:
        return partial(shifted_sums, geometry=geometry, groups=groups)
    merged = partial(_in_merged_groups, geometry=geometry, groups=groups, fewer=fewer)
    return partial(merged, precision=precision)


def _in_merged_groups(
    x: Array,
    weight: Array,
    geometry: Geometry,
    groups: int,
    fewer: int,
    precision: lax.PrecisionLike,
) -> Array:
    """As `_plain`, in fewer groups, each a convolution of its own."""
    weight = merge_groups(weight, groups, fewer)
    # Padded by XLA's convolution, gradients take up to three times as long.
    x = pad(x, geometry.padding, 0)
    unpadded = geometry._replace(padding=((0, 0),) * len(geometry.padding))
    plain = partial(_plain, geometry=unpadded, groups=1, precision=precision)
    return _group_by_group(plain, x, weight, fewer)


def _group_by_group(formulation: Formulation, x: Array, weight: Array, groups: int) -> Array:
    parts = zip(jnp.split(x, groups, -1), jnp.split(weight, groups, -1), strict=True)
    return jnp.concatenate([formulation(*part) for part in parts], -1)


def _product_of_patches(
    x: Array,
    weight: Array,
    geometry: Geometry,
    precision: lax.PrecisionLike,
    bias: Array | None = None,
) -> Array:
    matrix = weight.reshape(prod(weight.shape[:-1]), weight.shape[-1])
    return add_bias(matrix_product(_patches(x, geometry), matrix, precision), bias, x.dtype)


def _patches(x: Array, geometry: Geometry) -> Array:
    """The inputs of the kernel at every position, `(N, *positions, kernel * in)`."""
    x = pad(x, geometry.padding, 0)
    ndim = len(geometry.kernel)
    for i in range(ndim):
        x = jnp.stack(taps(x, i, geometry), axis=1 + ndim + i)
    return x.reshape(*x.shape[: ndim + 1], prod(geometry.kernel) * x.shape[-1])


def _with_one_more_row(
    x: Array, weight: Array, geometry: Geometry, precision: lax.PrecisionLike
) -> Array:
    """As `_plain`, with a row of outputs that reaches into the padding, and is cut off."""
    outputs, padding = positions(x.shape[1:-1], geometry), list(geometry.padding)
    padding[0] = (padding[0][0], padding[0][1] + geometry.strides[0])
    y = _plain(x, weight, geometry._replace(padding=tuple(padding)), 1, precision)
    return y[:, : outputs[0]]


def _in_tiles(
    x: Array,
    weight: Array,
    geometry: Geometry,
    precision: lax.PrecisionLike,
    bias: Array | None = None,
) -> Array:
    """One product of patches after the other, for some rows each, plus a bias."""
    batch, outputs = x.shape[0], positions(x.shape[1:-1], geometry)
    x = pad(x, geometry.padding, 0)
    bytes_per_row = prod(outputs[1:]) * prod(weight.shape[:-1]) * x.dtype.itemsize
    num_tiles = -(-outputs[0] // max(1, CROSSOVERS.tile_patches // bytes_per_row))
    rows = -(-outputs[0] // num_tiles)
    stride, reach = geometry.strides[0], (geometry.kernel[0] - 1) * geometry.dilations[0] + 1
    unpadded = geometry._replace(padding=((0, 0),) * len(geometry.padding))
    # The last tile is moved back to be as large as the others; it overwrites with equal values.
    starts = np.minimum(np.arange(num_tiles) * rows, outputs[0] - rows)

    origin = [0] * len(outputs)

    def add_tile(i: Array, y: Array) -> Array:
        image, start = lax.div(i, num_tiles), jnp.asarray(starts)[lax.rem(i, num_tiles)]
        shape = (1, (rows - 1) * stride + reach, *x.shape[2:])
        tile = lax.dynamic_slice(x, [image, start * stride, *origin], shape)
        tile = _product_of_patches(tile, weight, unpadded, precision, bias)
        return lax.dynamic_update_slice(y, tile, [image, start, *origin])

    empty = jnp.zeros((batch, *outputs, weight.shape[-1]), x.dtype)
    empty = varying_with((x, weight, bias), empty)
    y: Array = lax.fori_loop(0, batch * num_tiles, add_tile, empty)
    return y


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _convolve_by(
    formulation: Formulation,
    differentiated: Formulation,
    x: Array,
    weight: Array,
    bias: Array | None,
) -> Array:
    """`formulation(x, weight)` plus a bias; derivatives are those of `differentiated`."""
    return formulation(x, weight, bias=bias)


@partial(_convolve_by.defjvp, symbolic_zeros=True)
def _convolve_by_jvp(
    formulation: Formulation,
    differentiated: Formulation,
    primals: tuple[Array, Array, Array | None],
    tangents: tuple[Tangent, Tangent, Tangent | None],
) -> tuple[Array, Array]:
    (x, weight, bias), (x_dot, weight_dot, bias_dot) = primals, tangents
    y = _convolve_by(formulation, differentiated, x, weight, bias)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        y_dot += differentiated(x_dot, weight)
    if not isinstance(weight_dot, SymbolicZero):
        y_dot += differentiated(x, weight_dot)
    if not isinstance(bias_dot, SymbolicZero | None):
        y_dot += bias_dot
    return y, y_dot
