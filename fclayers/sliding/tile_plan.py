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
    """The slices of the image that a tile reads, the results to keep of it, and their positions."""

    pixels: tuple[slice, ...]
    kept: tuple[slice, ...]
    positions: tuple[slice, ...]


def plan_tiles(
    grid: Grid,
    axes: Sequence[int],
    shape: Sequence[int],
    tile_shape: Sequence[int],
    reach: Sequence[tuple[int, int]],
) -> list[Tile]:
    """Tiles of one size on an image of this shape; the last one along an axis is moved back.

    `reach` is how far windows see beyond themselves, in pixels, which tiles overlap by.
    """
    runs = [
        _along(*geometry)
        for geometry in zip(
            grid.counts,
            grid.stride,
            grid.window,
            (shape[axis] for axis in axes),
            tile_shape,
            reach,
            strict=True,
        )
    ]
    tiles = []
    for parts in product(*runs):
        pixels = [slice(None)] * len(shape)
        for axis, part in zip(axes, parts, strict=True):
            pixels[axis] = part[0]
        tiles.append(Tile(tuple(pixels), *zip(*(part[1:] for part in parts), strict=True)))
    return tiles


def _along(
    count: int, stride: int, window: int, size: int, tile: int, reach: tuple[int, int]
) -> list[tuple[slice, slice, slice]]:
    """Pixels, results to keep and positions of the tiles along one axis."""
    before, after = (-(-pixels // stride) for pixels in reach)
    larger = min(tile + before + after, count)
    # Padding comes behind the pixels that no window reaches.
    rest = (size - window) % stride if any(reach) else 0
    runs = []
    for i in range(0, count, tile):
        first = min(i, count - tile)
        start = max(0, min(first - before, count - larger))
        pixels = slice(start * stride, (start + larger - 1) * stride + window + rest)
        kept = slice(first - start, first - start + tile)
        runs.append((pixels, kept, slice(first, first + tile)))
    return runs


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
