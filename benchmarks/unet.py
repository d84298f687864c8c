"""A U-Net on overlapping windows, averaged where they overlap: `slide` against windows in batches.

`python benchmarks/unet.py` (the `peers` and `examples` extras), in float32. The U-Net pads every
convolution ("SAME"), goes down by max pools and up by transposed convolutions, and scores every
pixel of its window. The candidates, each from the image to its averaged scores:

- fclayers: `jit` of `slide` and the averages;
- windows: the same function under `vmap` on windows cut out, jitted, in a loop;
- monai: `monai.inferers.sliding_window_inference`, PyTorch, channels last;
- image edges: `slide(…, edges="image")`, which pads the image instead of every window. Its scores
  differ; the script says by how much.

The two with batches are run by the best of four batch sizes, on a part of the image, and scaled by
the number of windows. Beside the times are the operations that `explain_slide` counts.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax
from monai.inferers import sliding_window_inference

import fclayers as fc

CHANNELS, CLASSES = 1, 4
BATCHES = (1, 4, 16, 64)
EDGES = {"window": "fclayers", "image": "image edges"}  # of `slide`, and the candidate's name


class UNet(NamedTuple):
    """Blocks of two convolutions on the way down, the last at the bottom, and on the way up."""

    encoder: tuple[tuple[fc.ConvParams, ...], ...]
    ups: tuple[fc.ConvParams, ...]
    decoder: tuple[tuple[fc.ConvParams, ...], ...]
    head: fc.ConvParams


def init(key: jax.Array, widths: Sequence[int]) -> UNet:
    keys = iter(jax.random.split(key, 5 * len(widths)))
    he = jax.nn.initializers.he_normal()

    def conv(size: int, inputs: int, outputs: int) -> fc.ConvParams:
        return fc.init_conv(next(keys), (size, size), inputs, outputs, weight_init=he)

    def block(inputs: int, width: int) -> tuple[fc.ConvParams, ...]:
        return conv(3, inputs, width), conv(3, width, width)

    encoder = tuple(map(block, [CHANNELS, *widths], widths))
    pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
    ups = tuple(conv(2, below, width) for below, width in pairs)
    decoder = tuple(block(2 * width, width) for _, width in pairs)
    return UNet(encoder, ups, decoder, conv(1, widths[0], CLASSES))


def apply(params: UNet, window: jax.Array) -> jax.Array:
    """The scores of every pixel of one window, written as anyone would."""

    def block(convs: Sequence[fc.ConvParams], x: jax.Array) -> jax.Array:
        for conv in convs:
            x = jax.nn.relu(fc.apply_conv(conv, x, padding=1))
        return x

    def up(conv: fc.ConvParams, x: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_transpose(x[None], conv.weight, (2, 2), "VALID", dimension_numbers=layout)
        return y[0] + conv.bias

    skips = [block(params.encoder[0], window)]
    for convs in params.encoder[1:]:
        skips.append(block(convs, fc.max_pool(skips[-1], (2, 2))))
    x = skips.pop()
    for conv, convs in zip(params.ups, params.decoder, strict=True):
        x = block(convs, jnp.concatenate([up(conv, x), skips.pop()], axis=-1))
    return fc.apply_conv(params.head, x)


def fold(windows: jax.Array, stride: int) -> jax.Array:
    """Adds windows (positions, size, …), `stride` apart, up to one axis of pixels.

    Of every window the block number `i` of `stride` pixels lies `i` blocks after its position.
    """
    positions, size, *rest = windows.shape
    blocks = windows.reshape(positions, size // stride, stride, *rest)
    count = size // stride
    total = jnp.zeros((positions + count - 1, stride, *rest), windows.dtype)
    for i in range(count):
        total = total.at[i : i + positions].add(blocks[:, i])
    return total.reshape(-1, *rest)


def average(scores: jax.Array, stride: int) -> jax.Array:
    """Means (height, width, classes) of the scores of windows, by rows and columns of them."""
    rows, columns, size, _, _ = scores.shape
    by_row = fold(scores.swapaxes(1, 2), stride)  # (height, columns, size, classes)
    total = jax.vmap(partial(fold, stride=stride))(by_row)
    return total / windows_on_pixels((rows, columns), size, stride)


def windows_on_pixels(positions: Sequence[int], size: int, stride: int) -> np.ndarray:
    """How many windows (height, width, 1) lie on every pixel."""
    block = np.ones(size // stride, np.float32)
    rows, columns = (
        np.repeat(np.convolve(np.ones(n, np.float32), block), stride) for n in positions
    )
    return np.multiply.outer(rows, columns)[..., None]


def sliding(
    params: UNet, image: jax.Array, *, size: int, stride: int, edges: str = "window"
) -> jax.Array:
    return average(fc.slide(apply, (size, size), stride=stride, edges=edges)(params, image), stride)


@partial(jax.jit, donate_argnums=0, static_argnames="size")
def add_batch(
    total: jax.Array, params: UNet, image: jax.Array, corners: jax.Array, *, size: int
) -> jax.Array:
    def cut(corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, CHANNELS))

    scores = jax.vmap(lambda corner: apply(params, cut(corner)))(corners)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        start = (corners[i, 0], corners[i, 1], 0)
        sums = lax.dynamic_slice(total, start, scores.shape[1:]) + scores[i]
        return lax.dynamic_update_slice(total, sums, start)

    return lax.fori_loop(0, len(corners), add, total)


def jax_windows(params: UNet, image: jax.Array, batch: int, *, size: int, stride: int) -> jax.Array:
    """A Python loop: inside `lax.map`, XLA's CPU convolutions are several times slower."""
    positions = positions_of(image, size, stride)
    corners = stride * np.indices(positions).reshape(2, -1).T
    total = jnp.zeros((*image.shape[:2], CLASSES))
    for start in range(0, len(corners), batch):
        total = add_batch(total, params, image, corners[start : start + batch], size=size)
    return total / windows_on_pixels(positions, size, stride)


def positions_of(image: jax.Array, size: int, stride: int) -> tuple[int, ...]:
    return tuple((n - size) // stride + 1 for n in image.shape[:2])


def torch_unet(params: UNet) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same weights in PyTorch, channels last."""
    tensors = {name: torch.from_numpy(array) for name, array in fc.interop.to_torch(params).items()}
    for i in range(len(params.ups)):
        # PyTorch's transposed convolution is the gradient of a convolution, whose kernel is
        # mirrored; `lax.conv_transpose` does not mirror it.
        tensors[f"ups.{i}.weight"] = tensors[f"ups.{i}.weight"].swapaxes(0, 1).flip(2, 3)
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            tensors[name] = tensor.contiguous(memory_format=torch.channels_last)

    def parts(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = F.relu(F.conv2d(x, *parts(f"{name}.{i}"), padding=1))
        return x

    def forward(windows: torch.Tensor) -> torch.Tensor:
        x = windows.contiguous(memory_format=torch.channels_last)
        skips = [block("encoder.0", x)]
        for i in range(1, len(params.encoder)):
            skips.append(block(f"encoder.{i}", F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for i in range(len(params.ups)):
            up = F.conv_transpose2d(x, *parts(f"ups.{i}"), stride=2)
            x = block(f"decoder.{i}", torch.cat([up, skips.pop()], dim=1))
        return F.conv2d(x, *parts("head"))

    return forward


def monai_windows(
    network: Callable[[torch.Tensor], torch.Tensor],
    image: jax.Array,
    batch: int,
    *,
    size: int,
    stride: int,
) -> np.ndarray:
    pixels = torch.tensor(np.asarray(image)).movedim(-1, 0)[None]
    with torch.inference_mode():
        scores = sliding_window_inference(
            pixels, (size, size), batch, network, overlap=1 - stride / size, mode="constant"
        )
    return scores[0].movedim(0, -1).numpy()


def best_seconds(call: Callable[[int], object]) -> float:
    """Time of the best of four batch sizes; each is called once before, to compile."""
    times = []
    for batch in BATCHES:
        jax.block_until_ready(call(batch))
        start = time.perf_counter()
        jax.block_until_ready(call(batch))
        times.append(time.perf_counter() - start)
    return min(times)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest score."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=int, default=512, help="side of the image")
    parser.add_argument("--window", type=int, default=128, help="side of a window")
    parser.add_argument("--stride", type=int, default=16, help="pixels between windows")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="per level")
    parser.add_argument("--part", type=int, default=256, help="side of the part for batches")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the two with `slide`")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/unet.json"))
    args = parser.parse_args()
    if args.window % args.stride or args.stride % 2 ** (len(args.widths) - 1):
        parser.error("--window must be a multiple of --stride, and that of the pools' product")

    params = init(jax.random.key(0), args.widths)
    network = torch_unet(params)
    image = jax.random.normal(jax.random.key(1), (args.image, args.image, CHANNELS))
    part = image[: args.part, : args.part]
    grid = {"size": args.window, "stride": args.stride}

    def score(edges: str) -> Callable[[UNet, jax.Array], jax.Array]:
        return jax.jit(partial(sliding, edges=edges, **grid))

    expected = monai_windows(network, part, 4, **grid)
    for actual in (score("window")(params, part), jax_windows(params, part, 4, **grid)):
        assert distance(np.asarray(actual), expected) < 1e-5

    compiled = {edges: score(edges).lower(params, image).compile() for edges in EDGES}
    times = timing.time_side_by_side(
        {
            name: lambda edges=edges: compiled[edges](params, image).block_until_ready()
            for edges, name in EDGES.items()
        },
        rounds=args.rounds,
    )
    positions = positions_of(image, **grid)
    scale = prod(positions) / prod(positions_of(part, **grid))
    times["windows"] = scale * best_seconds(lambda batch: jax_windows(params, part, batch, **grid))
    times["monai"] = scale * best_seconds(lambda batch: monai_windows(network, part, batch, **grid))

    window = (args.window, args.window)
    for edges, name in EDGES.items():
        report = fc.explain_slide(apply, window, stride=args.stride, edges=edges)(params, image)
        print(f"{name}\n{report}\n")
        print(
            f"Windows need {report.flops_windows / report.flops:.2f} times the operations of "
            f"{name}, and took {times['windows'] / times[name]:.2f} times as long\n"
        )
    exact, other = (np.asarray(compiled[edges](params, image)) for edges in EDGES)
    changed = (exact.argmax(-1) != other.argmax(-1)).mean()
    print(
        f"Image edges: scores up to {distance(other, exact):.2g} of the largest one off, "
        f"another class at {changed:.2%} of the pixels\n"
    )
    name = f"U-Net {args.widths}, {args.window}×{args.window}, stride {args.stride}, on "
    results = {name + f"{args.image}×{args.image}": times}
    print(timing.format_table(results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
