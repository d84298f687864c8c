"""`slide_tiles`: `slide` over an image larger than memory, tile by tile."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fclayers._checks import check_array, check_count, describe
from fclayers.slide.arguments import check_windows, place_windows
from fclayers.slide.transform import slide

# Without a `tile_shape`, a tile of the image and its results together are at most this large.
_TILE_BYTES = 2**26


def slide_tiles(
    fun: Callable[..., Any],
    window_shape: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    tile_shape: int | tuple[int, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Callable[..., None]:
    """Makes a function that evaluates `fun` at every window of an image larger than memory.

    It is `slide` with window edges, on tiles of the image that overlap as the windows need it. One
    tile and its results are in memory at a time. All tiles have one shape, so that the function is
    compiled once: the last one along an axis is moved back into the image.

    Args:
        fun: A function `fun(*args, window)`, as `slide` takes it; `args` are pytrees of arrays.
        window_shape: Size of the window along each window axis, one to three of them. An integer
            is a window along one axis.
        stride: Pixels between neighbouring windows, an integer or one per window axis.
        axes: The window axes of the image, in the order of `window_shape`. Default: the leading
            ones.
        tile_shape: Positions per tile, an integer or one per window axis. Default: so many that a
            tile of the image and its results together take at most 64 MiB. What `fun` computes in
            between comes on top of that.
        resume: A small file that records, after each tile, how many are finished. If it is there, a
            run goes on after them; to start anew, delete it. It belongs to the contents of `out`,
            and knows all that a run depends on but the code of `fun` and the values of the image.
        progress: Whether to show a progress bar, by the `tqdm` package.

    Returns:
        A function `g(*args, image, out)` that writes `slide(fun, ...)(*args, image)` into `out`.
        The image is anything with `shape`, `dtype` and slices, such as a `np.memmap`; `out` is
        anything that also takes `out[i0:i1, j0:j1] = results`, or a pytree of these that matches
        the results of `fun`, each with the positions as its leading axes.

    Raises:
        ModuleNotFoundError: The `tqdm` package is missing.
        OSError: The file `resume` cannot be read or written.
        TypeError: The image or `out` is missing or not an array.
        ValueError: The window does not fit the image, an argument is out of range, `out` does not
            match the results, or `resume` is the file of another run or damaged.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import fclayers as fc
        >>> folder = tempfile.mkdtemp()
        >>> image = np.memmap(f"{folder}/image", np.uint8, "w+", shape=(300, 400, 3))
        >>> out = np.memmap(f"{folder}/brightest", np.uint8, "w+", shape=(293, 393))
        >>> image[100, 200] = 255
        >>> brightest = fc.slide_tiles(jnp.max, (8, 8), tile_shape=(100, 200), progress=False)
        >>> brightest(image, out)
        >>> int((out == 255).sum())
        64
    """
    name = "slide_tiles"
    window, strides = check_windows(name, window_shape, stride, "window")
    limits = None if tile_shape is None else _check_tile(name, tile_shape, len(window))
    record = None if resume is None else Path(resume)
    sliding = jax.jit(slide(fun, window, stride=strides, axes=axes))

    def tiling(*args: Any) -> None:
        if len(args) < 2:
            raise TypeError(f"{name}: expected (*args, image, out), got {len(args)} arguments")
        *rest, image, out = args
        check_array(name, "the image", image)
        dtype = np.dtype(image.dtype).newbyteorder("=")
        grid, places = place_windows(name, image.shape, window, strides, axes, "window")
        counts, shape = grid.counts, list(image.shape)
        for place, size in zip(places, window, strict=True):
            shape[place] = size
        one = _abstract(tuple(shape), dtype)
        results = jax.eval_shape(fun, *rest, one)
        targets = _check_out(name, out, results, counts)
        tile = _choose_tile(counts, window, strides, one, results)
        if limits is not None:
            tile = tuple(map(min, limits, counts))
        starts = [
            [min(i, n - t) for i in range(0, n, t)] for n, t in zip(counts, tile, strict=True)
        ]
        tiles, finished = list(product(*starts)), 0
        if record is not None:
            run = {
                "image": describe(image),
                "out": str(list(map(describe, targets))),
                "args": _digest(rest),
                "windows": f"{window} along axes {places}, {strides} pixels apart",
                "tile": str(tile),
            }
            finished = _read_record(name, record, run, len(tiles))
        rest = jax.device_put(rest)

        def run_tile(start: tuple[int, ...]) -> None:
            pixels = [slice(None)] * len(image.shape)
            for place, i, t, s, w in zip(places, start, tile, strides, window, strict=True):
                pixels[place] = slice(i * s, (i + t - 1) * s + w)
            found = jax.device_get(sliding(*rest, np.asarray(image[tuple(pixels)], dtype)))
            positions = tuple(slice(i, i + t) for i, t in zip(start, tile, strict=True))
            for target, values in zip(targets, jax.tree.leaves(found), strict=True):
                target[positions] = values

        bar = _show_progress(name, tiles, finished) if progress else tiles[finished:]
        for done, start in enumerate(bar, finished + 1):
            run_tile(start)
            if record is not None:
                for target in targets:
                    getattr(target, "flush", lambda: None)()
                _write_record(record, run, done)

    return tiling


def _check_tile(name: str, tile_shape: Any, ndim: int) -> tuple[int, ...]:
    tile = tile_shape if isinstance(tile_shape, (tuple, list)) else (tile_shape,) * ndim
    if len(tile) != ndim or any(check_count(name, "tile_shape", entry) < 1 for entry in tile):
        raise ValueError(
            f"{name}: tile_shape must be an integer >= 1 or {ndim} of them, one per window axis, "
            f"got {tile_shape}"
        )
    return tuple(map(int, tile))


def _check_out(name: str, out: Any, results: Any, counts: tuple[int, ...]) -> list[Any]:
    """The arrays in `out`; raises one error that names all that do not match the results."""
    expected, actual = str(jax.tree.structure(results)), str(jax.tree.structure(out))
    if actual != expected:
        raise ValueError(f"{name}: expected out to have the structure {expected}, got {actual}")
    targets, problems = jax.tree.leaves(out), []
    for (path, result), target in zip(jax.tree.leaves_with_path(results), targets, strict=True):
        wanted = describe(_abstract((*counts, *result.shape), result.dtype))
        if describe(target) != wanted:
            entry = f"out{jax.tree_util.keystr(path)}"
            problems.append(f"{entry} should be {wanted}, is {describe(target)}")
    if problems:
        raise ValueError("\n  ".join([f"{name}: nothing was computed, because of", *problems]))
    return targets


def _choose_tile(
    counts: tuple[int, ...],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    one: jax.ShapeDtypeStruct,
    results: Any,
) -> tuple[int, ...]:
    """Halves the longest axis until a tile and its results are small."""
    tile = list(counts)
    pixel: int = prod(one.shape) // prod(window) * one.dtype.itemsize
    result: int = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(results))

    def size() -> int:
        pixels = ((t - 1) * s + w for t, s, w in zip(tile, strides, window, strict=True))
        return prod(pixels) * pixel + prod(tile) * result

    while size() > _TILE_BYTES and max(tile) > 1:
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tuple(tile)


def _show_progress(name: str, tiles: Sequence[Any], finished: int) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: the progress bar needs tqdm: pip install tqdm, or pass progress=False"
        ) from error
    return tqdm(tiles[finished:], initial=finished, total=len(tiles), unit="tile")


def _read_record(name: str, path: Path, run: dict[str, str], total: int) -> int:
    """The number of finished tiles; begins a record if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        _write_record(path, run, 0)
        return 0
    except ValueError as error:
        raise ValueError(f"{name}: {path} is damaged, or no record of a run: {error}") from error
    match record:
        case {"finished": int(), **then} if then != run:
            changes = [
                f"{key} was {then.get(key)}, is {now}"
                for key, now in run.items()
                if then.get(key) != now
            ]
            raise ValueError("\n  ".join([f"{name}: {path} records another run:", *changes]))
        case {"finished": int(finished)} if 0 <= finished <= total:
            return finished
    raise ValueError(f"{name}: {path} is damaged, or no record of a run: it has {record!r:.200}")


def _write_record(path: Path, run: dict[str, str], finished: int) -> None:
    """Writes the record beside its place and renames it, so that it is never half there."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w") as file:
        json.dump({"finished": finished, **run}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _digest(args: Sequence[Any]) -> str:
    """A hash of the structure and values of `args`."""
    digest = hashlib.sha256(str(jax.tree.structure(args)).encode())
    for leaf in jax.tree.leaves(args):
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(describe(np.asarray(leaf)).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _abstract(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]
