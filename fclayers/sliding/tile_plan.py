"""Where the tiles of an image lie, and how large they are."""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import jax

from fclayers.sliding.values import Grid

# By default, a tile of the image and its results together are at most this large.
_TILE_BYTES = 2**26


class Tile(NamedTuple):
    """The slices of the image that a tile reads, and the positions that it computes."""

    pixels: tuple[slice, ...]
    positions: tuple[slice, ...]


def plan_tiles(grid: Grid, axes: Sequence[int], ndim: int, tile_shape: Sequence[int]) -> list[Tile]:
    """Tiles of one shape on an image of `ndim` axes; the last one along an axis is moved back."""
    starts = [
        [min(i, count - size) for i in range(0, count, size)]
        for count, size in zip(grid.counts, tile_shape, strict=True)
    ]
    tiles = []
    for corner in product(*starts):
        pixels, positions = [slice(None)] * ndim, []
        for axis, i, size, s, w in zip(
            axes, corner, tile_shape, grid.stride, grid.window, strict=True
        ):
            pixels[axis] = slice(i * s, (i + size - 1) * s + w)
            positions.append(slice(i, i + size))
        tiles.append(Tile(tuple(pixels), tuple(positions)))
    return tiles


def choose_tile_shape(
    grid: Grid, window: jax.ShapeDtypeStruct, results: Sequence[jax.ShapeDtypeStruct]
) -> tuple[int, ...]:
    """Halves the longest axis until a tile and its results are small."""
    tile = list(grid.counts)
    pixel: int = prod(window.shape) // prod(grid.window) * window.dtype.itemsize
    result: int = sum(prod(array.shape) * array.dtype.itemsize for array in results)

    def size() -> int:
        pixels = ((t - 1) * s + w for t, s, w in zip(tile, grid.stride, grid.window, strict=True))
        return prod(pixels) * pixel + prod(tile) * result

    while size() > _TILE_BYTES and max(tile) > 1:
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tuple(tile)
