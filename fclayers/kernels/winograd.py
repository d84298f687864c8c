"""Convolutions over one or two axes with fewer products, after Toom, Cook and Winograd.

A block of `m` outputs of a kernel of `k` taps is a product of polynomials, evaluated at
`n = m + k - 1` points instead of `m * k` products: the inputs are transformed to values at the
points, multiplied by the transformed kernel, and transformed back. With a dilation, every phase of
the map has blocks of its own.

The transforms of the first axis are products with small matrices, those of the second are sums of
slices, one for every point: XLA's CPU backend would fuse two sums in a row and compute the first
anew for every term of the second.

Source: `Lavin and Gray 2016 <https://arxiv.org/abs/1509.09308>`_; the points are those of
`Barabasz et al. 2020 <https://arxiv.org/abs/1803.10986>`_.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fclayers._util.meshes import varying_with
from fclayers.kernels.crossovers import CROSSOVERS
from fclayers.kernels.product import add_bias
from fclayers.kernels.windows import Geometry, pad, positions

# Beside infinity.
_POINTS = (0, 1, -1, 0.5, -2, -0.5, 2)
# Outputs of a block by size of the kernel. Larger blocks save more products and round more: with
# these, errors of random shapes stayed below 2e-5 of the largest output.
_LARGEST_BLOCKS = {1: 1, 2: 4, 3: 4, 4: 4, 5: 4, 6: 2, 7: 2}


class _Axis(NamedTuple):
    """How the outputs of one spatial axis are cut into blocks."""

    kernel: int
    dilation: int
    block: int
    blocks: int

    @property
    def points(self) -> int:
        return self.block + self.kernel - 1

    @property
    def step(self) -> int:
        """Outputs of the blocks of all phases."""
        return self.block * self.dilation

    @property
    def overlap(self) -> int:
        """Blocks that inputs reach beyond the last block of outputs."""
        return -(-(self.kernel - 1) // self.block)


def winograd_wins(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry
) -> bool:
    """Whether `winograd_convolve` applies and is faster for a map `(N, *spatial, in)`."""
    if len(geometry.kernel) > 2 or max(geometry.strides) > 1:
        return False
    if max(geometry.kernel) not in _LARGEST_BLOCKS or max(geometry.kernel) == 1:
        return False
    channels, features = weight_shape[-2:]
    if min(channels, features) < CROSSOVERS.winograd_channels:
        return False
    outputs = positions(x_shape[1:-1], geometry)
    axes = _axes(outputs, geometry)
    rows = x_shape[0] * prod(axis.blocks * axis.dilation for axis in axes)
    points = prod(axis.points for axis in axes)
    taps = x_shape[0] * prod(outputs) * prod(geometry.kernel)
    return (
        rows >= CROSSOVERS.winograd_rows
        and taps >= CROSSOVERS.winograd_gain * rows * points
        and points * features * channels * 4 <= max(CROSSOVERS.winograd_kernel, taps * channels * 4)
    )


def winograd_convolve(
    x: Array, weight: Array, geometry: Geometry, bias: Array | None = None
) -> Array:
    """Convolves `(N, *spatial, in)` with `(*kernel, in, out)`, and adds a bias.

    All are in float32, and the geometry has no strides.
    """
    x = pad(x, geometry.padding, 0)
    unpadded = geometry._replace(padding=((0, 0),) * len(geometry.padding))
    axes = _axes(positions(x.shape[1:-1], unpadded), geometry)
    if len(axes) == 1:
        axes = (_Axis(1, 1, 1, 1), *axes)
        y = _convolve(x[:, None], weight[None], axes, bias)
        return y[:, 0]
    return _convolve(x, weight, axes, bias)


def transforms(block: int, kernel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `n` points the matrices of outputs (block, n), kernel (n, kernel) and inputs (n, n)."""
    n = block + kernel - 1
    points = np.array(_POINTS[: n - 1], float)

    def at_points(terms: int) -> np.ndarray:
        """Values of a polynomial from its coefficients; at infinity, the last one."""
        return np.vstack([points[:, None] ** np.arange(terms), np.eye(terms)[-1]])

    scales, inputs = np.ones((n, 1)), np.zeros((n, n))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        scales[i] = np.prod(point - others)
        inputs[i, :-1] = np.atleast_1d(np.poly(others))[::-1]
    inputs[-1] = np.atleast_1d(np.poly(points))[::-1]
    outputs, kernels = at_points(block).T, at_points(kernel) / scales
    return outputs.astype(np.float32), kernels.astype(np.float32), inputs.astype(np.float32)


def _axes(outputs: tuple[int, ...], geometry: Geometry) -> tuple[_Axis, ...]:
    """The blocks with the fewest products."""
    axes = []
    for size, kernel, dilation in zip(outputs, geometry.kernel, geometry.dilations, strict=True):
        step = dilation if kernel > 1 else 1
        blocks = range(_LARGEST_BLOCKS[kernel], 0, -1)
        choices = [_Axis(kernel, step, block, -(-size // (block * step))) for block in blocks]
        axes.append(min(choices, key=lambda axis: axis.points * axis.blocks))
    return tuple(axes)


def _convolve(x: Array, weight: Array, axes: tuple[_Axis, ...], bias: Array | None) -> Array:
    """Convolves `(N, height, width, in)` with `(height, width, in, out)`, in tiles of blocks."""
    rows, columns = axes
    batch, channels, features = x.shape[0], x.shape[-1], weight.shape[-1]
    height, width = (
        size - (axis.kernel - 1) * axis.dilation
        for size, axis in zip(x.shape[1:3], axes, strict=True)
    )
    kernels = _transformed_kernel(weight, axes)
    # A tile is some blocks of rows of one image, or some images.
    in_tile = batch * rows.blocks
    patches = batch * height * width * rows.kernel * columns.kernel * channels
    if patches * x.dtype.itemsize > CROSSOVERS.large_patches:
        values = rows.points * columns.points * rows.dilation * columns.dilation * columns.blocks
        block_bytes = values * (channels + features) * x.dtype.itemsize
        in_tile = max(1, CROSSOVERS.winograd_tile // block_bytes)
    rows_tiles = -(-rows.blocks // in_tile)
    blocks = -(-rows.blocks // rows_tiles)
    image_tiles = -(-batch // max(1, in_tile // blocks)) if rows_tiles == 1 else batch
    images = -(-batch // image_tiles)

    def one_tile(x: Array) -> Array:
        y = _convolve_tile(x, kernels, (rows._replace(blocks=blocks), columns), width)
        return add_bias(y, bias, y.dtype)

    if rows_tiles * image_tiles == 1:
        return one_tile(x)[:, :height]
    # The last tile is moved back to be as large as the others; it overwrites with equal values.
    out_rows = min(height, blocks * rows.step)
    first_rows = np.minimum(np.arange(rows_tiles) * blocks * rows.step, height - out_rows)
    first_images = np.minimum(np.arange(image_tiles) * images, batch - images)
    in_rows = out_rows + (rows.kernel - 1) * rows.dilation

    def add_tile(i: Array, y: Array) -> Array:
        image = jnp.asarray(first_images)[lax.div(i, rows_tiles)]
        origin: list[Array | int] = [image, jnp.asarray(first_rows)[lax.rem(i, rows_tiles)], 0, 0]
        tile = lax.dynamic_slice(x, origin, (images, in_rows, x.shape[2], channels))
        return lax.dynamic_update_slice(y, one_tile(tile)[:, :out_rows], origin)

    empty = jnp.zeros((batch, height, width, features), x.dtype)
    empty = varying_with((x, weight, bias), empty)
    y: Array = lax.fori_loop(0, rows_tiles * image_tiles, add_tile, empty)
    return y


def _transformed_kernel(weight: Array, axes: tuple[_Axis, ...]) -> Array:
    """The kernel at the points of the columns and rows, `(points, points, in, out)`."""
    rows, columns = (transforms(axis.block, axis.kernel)[1] for axis in axes)
    both = np.einsum("tj,si->tsij", columns, rows).reshape(-1, rows.shape[1] * columns.shape[1])
    flat = weight.reshape(both.shape[1], -1)
    return _product(both, flat).reshape(len(columns), len(rows), *weight.shape[2:])


def _convolve_tile(x: Array, kernels: Array, axes: tuple[_Axis, ...], width: int) -> Array:
    """Convolves a map `(N, height, width, in)` of whole blocks."""
    rows, columns = axes
    batch, channels, features = x.shape[0], x.shape[-1], kernels.shape[-1]
    from_points, _, to_points = transforms(columns.block, columns.kernel)
    lines = batch * rows.blocks * rows.dilation
    values = _rows_to_points(x, rows, columns)
    values = values.reshape(rows.points * lines, -1, columns.block, columns.dilation * channels)
    slices = [
        values[:, start : start + columns.blocks, place]
        for start, place in (divmod(j, columns.block) for j in range(columns.points))
    ]
    at_points = jnp.stack([_combine(coefficients, slices) for coefficients in to_points])
    at_points = at_points.reshape(columns.points, rows.points, -1, channels)
    products = lax.dot_general(at_points, kernels, (((3,), (2,)), ((0, 1), (0, 1))))
    products = products.reshape(columns.points, -1, columns.dilation * features)
    y = jnp.stack([_combine(coefficients, products) for coefficients in from_points], axis=1)
    y = _product(transforms(rows.block, rows.kernel)[0], y.reshape(rows.points, -1))
    y = y.reshape(rows.block, batch * rows.blocks, rows.dilation, -1, features)[:, :, :, :width]
    return y.swapaxes(0, 1).reshape(batch, -1, width, features)


def _rows_to_points(x: Array, rows: _Axis, columns: _Axis) -> Array:
    """The inputs of every block of rows at the points, `(points, N * blocks * ...)`."""
    whole = [(axis.blocks + axis.overlap) * axis.step for axis in (rows, columns)]
    x = pad(x, tuple((0, a - b) for a, b in zip(whole, x.shape[1:3], strict=True)), 0)
    x = x.reshape(x.shape[0], rows.blocks + rows.overlap, rows.block, -1)
    in_blocks = x.transpose(2, 0, 1, 3)
    parts = [
        in_blocks[: rows.points - start * rows.block, :, start : start + rows.blocks]
        for start in range(rows.overlap + 1)
    ]
    windows = jnp.concatenate(parts).reshape(rows.points, -1)
    return _product(transforms(rows.block, rows.kernel)[2], windows)


def _product(matrix: np.ndarray, x: Array) -> Array:
    return x if matrix.shape == (1, 1) else jnp.asarray(matrix) @ x


def _combine(coefficients: np.ndarray, terms: Iterable[Array]) -> Array:
    """The sum of the terms, each times its coefficient."""
    total: Array | None = None
    for c, term in zip(coefficients, terms, strict=True):
        if c:
            scaled = term if c == 1 else term * c
            total = scaled if total is None else total + scaled
    assert total is not None
    return total
