"""`slide_tiles`: `slide` over an image larger than memory, tile by tile."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from fclayers._util.checks import check_array, check_count, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.progress import progress_bar
from fclayers._util.trees import abstract, path_name
from fclayers.sliding.arguments import check_windows, place_windows
from fclayers.sliding.interpret import Trace
from fclayers.sliding.tile_plan import choose_tile_shape, plan_tiles
from fclayers.sliding.tile_record import digest, read_record, write_record
from fclayers.sliding.transform import slide_and_trace

Reach = list[tuple[int, int]]


@runtime_checkable
class Target(Protocol):
    """What results are written to, such as a `np.memmap`."""

    def __setitem__(self, positions: tuple[slice, ...], results: np.ndarray, /) -> None: ...


@public
def slide_tiles(
    fun: Callable[..., PyTree[Array]],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    edges: str = "window",
    tile_shape: tuple[int, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Callable[..., None]:
    """Makes a function that evaluates `fun` at every window of an image larger than memory.

    It runs `slide` on tiles of the image that overlap as the windows need it, one tile in memory at
    a time. All tiles have one shape, so that the function is compiled once: the last one along an
    axis is moved back into the image. The results are those of `slide` on the whole image, to the
    last bit where XLA and this library compute products of both sizes in the same order, and up to
    rounding where they choose another formulation for the larger one.

    Args:
        fun: A function `fun(*args, window)`, as `slide` takes it; `args` are pytrees of arrays.
        window_shape: As in `slide`.
        stride: As in `slide`.
        axes: As in `slide`.
        edges: As in `slide`. With `"image"`, tiles overlap by as much as padding reaches, too.
        tile_shape: Positions per tile along each window axis. Default: so many that a tile of the
            image and its results together take at most 64 MiB; what `fun` computes in between
            comes on top.
        resume: A small file that records, after each tile, how many are finished. If it exists, the
            run resumes after them; to start anew, delete it. It belongs to the contents of `out`,
            and detects changes of the arguments, but not of the code of `fun` or the image's
            values.
        progress: Whether to show a progress bar, if `tqdm` is installed.

    Returns:
        A function `g(*args, image, out)` that writes `slide(fun, ...)(*args, image)` into `out`.
        The image is anything with `shape`, `dtype` and slices, such as a `np.memmap`; `out` is
        anything that also takes `out[i0:i1, j0:j1] = results`, or a pytree of these that matches
        the results of `fun`, each with the positions as its leading axes.

    Raises:
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
    window, strides = check_windows(window_shape, stride, edges)
    largest = None if tile_shape is None else _check_tile_shape(tile_shape, len(window))
    record = None if resume is None else Path(resume)
    traced = slide_and_trace(
        fun, window, stride=strides, axes=axes, edges=edges, trace_one=edges == "image"
    )
    sliding = jax.jit(lambda *args: traced(*args)[0])

    def tiling(*args: PyTree) -> None:
        if len(args) < 2:
            raise BadType(f"expected (*args, image, out), got {len(args)} arguments")
        *rest, image, out = args
        check_array("the image", image)
        grid, places = place_windows(image.shape, window, strides, axes, edges)
        dtype = np.dtype(image.dtype).newbyteorder("=")
        one = abstract(_window_of(image.shape, places, window), dtype)
        results = jax.eval_shape(fun, *rest, one)
        targets = _check_out(out, results, grid.counts)
        tile = largest or choose_tile_shape(grid, one, jax.tree.leaves(results))
        tile = tuple(map(min, tile, grid.counts))
        reach = [(0, 0)] * len(window)
        if edges == "image":
            reach = _reach_of(traced, *rest, abstract(image.shape, dtype))
        tiles, finished = plan_tiles(grid, places, image.shape, tile, reach), 0
        if record is not None:
            run = {
                "image": describe(image),
                "out": str(list(map(describe, targets))),
                "args": digest(rest),
                "windows": f"{window} along axes {places}, {strides} pixels apart",
                "edges": edges,
                "tile": str(tile),
            }
            finished = read_record(record, run, len(tiles))
        rest = jax.device_put(rest)
        with progress_bar(len(tiles), unit="tile", initial=finished, show=progress) as bar:
            for done, (pixels, kept, positions) in enumerate(tiles[finished:], finished + 1):
                found = jax.device_get(sliding(*rest, np.asarray(image[pixels], dtype)))
                for target, values in zip(targets, jax.tree.leaves(found), strict=True):
                    target[positions] = values[kept]
                if record is not None:
                    _flush(targets)
                    write_record(record, run, done)
                bar.update()

    return public(tiling, "slide_tiles")


def _reach_of(traced: Callable[..., tuple[PyTree, Trace]], *args: PyTree) -> Reach:
    """How far windows see beyond themselves, by tracing the function on the whole image."""
    found: list[Trace] = []

    def run(*args: PyTree) -> PyTree:
        outs, trace = traced(*args)
        found[:] = [trace]
        return outs

    jax.eval_shape(run, *args)
    return found[0].reach


def _check_tile_shape(tile_shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    is_tuple = isinstance(tile_shape, (tuple, list)) and len(tile_shape) == ndim
    if not is_tuple or any(check_count("tile_shape", n) < 1 for n in tile_shape):
        raise BadValue(
            f"tile_shape must be a tuple of {ndim} integers >= 1, one per window axis, "
            f"got {tile_shape}"
        )
    return tuple(map(int, tile_shape))


def _window_of(
    shape: Sequence[int], places: Sequence[int], window: Sequence[int]
) -> tuple[int, ...]:
    """The shape of a window of an image of this shape."""
    sizes = dict(zip(places, window, strict=True))
    return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))


def _check_out(out: PyTree, results: PyTree, counts: tuple[int, ...]) -> list[Target]:
    """The arrays in `out`; raises one error that names all that do not match the results."""
    expected, actual = str(jax.tree.structure(results)), str(jax.tree.structure(out))
    if actual != expected:
        raise BadValue(f"expected out to have the structure {expected}, got {actual}")
    targets, problems = jax.tree.leaves(out), []
    for (path, result), target in zip(jax.tree.leaves_with_path(results), targets, strict=True):
        wanted = describe(abstract((*counts, *result.shape), result.dtype))
        if describe(target) != wanted:
            entry = ".".join(filter(None, ["out", path_name(path)]))
            problems.append(f"{entry} should be {wanted}, is {describe(target)}")
    if problems:
        raise BadValue("\n  ".join(["nothing was computed, because of", *problems]))
    return targets


def _flush(targets: Sequence[Target]) -> None:
    for target in targets:
        getattr(target, "flush", lambda: None)()
