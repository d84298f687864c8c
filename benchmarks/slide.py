"""`slide` against windows in batches, PyTorch, and the matrix-multiply peak, in float32.

`python benchmarks/slide.py` (the `peers` and `examples` extras). The candidates:

- fclayers: `jit(slide(f))`, `f` being the network for one window;
- windows: `f` under `vmap` on windows cut out, jitted, in a loop, by the best of four batch sizes;
- torch windows: the same in PyTorch;
- torch dilated: the network rewritten by hand, with a dilation in place of each pool's stride,
  channels last;
- score map by hand: `vgg16_score_map`, for VGG-16;
- peak: the products that sharing needs, at the speed of a 2048×2048 matrix product of this run.

Windows in batches take minutes. They are timed on some of the windows and scaled to all of them.
The cases of `slide_padded.py` follow.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import slide_padded
import timing
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax
from tqdm import tqdm

import fclayers as fc


class Network(NamedTuple):
    """Convolutions, each perhaps with a pool after it, and fully connected layers."""

    window: int
    channels: int
    convs: Sequence[tuple[int, int, int]]  # kernel, outputs, pool
    head: Sequence[int]


NETWORKS = {
    "15×15": Network(15, 1, ((4, 8, 2), (3, 16, 2), (2, 128, 1)), (113,)),
    "33×33": Network(33, 1, ((4, 48, 2), (4, 48, 2), (4, 48, 1)), (200, 2)),
    "95×95": Network(95, 1, ((4, 48, 2), (5, 48, 2), (4, 48, 2), (4, 48, 2)), (200, 2)),
    "digits": Network(8, 1, ((3, 16, 1), (3, 32, 1)), (128, 11)),
}
CASES = [
    ("15×15", (480, 640)),
    ("33×33", (512, 512)),
    ("95×95", (256, 256)),
    ("95×95", (512, 512)),
    ("digits", (160, 240)),
]


def init(network: Network) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    convs, size, channels = [], network.window, network.channels
    for kernel, outputs, pool in network.convs:
        convs.append(fc.init_conv(next(keys), (kernel, kernel), channels, outputs))
        size, channels = (size - kernel + 1) // pool, outputs
    return tuple(convs), fc.init_mlp(next(keys), [size * size * channels, *network.head])


def apply(network: Network, params: Any, window: jax.Array) -> jax.Array:
    """The network for one window, written as anyone would."""
    convs, head = params
    x = window
    for conv, (_, _, pool) in zip(convs, network.convs, strict=True):
        x = jax.nn.relu(fc.apply_conv(conv, x))
        x = fc.max_pool(x, (pool, pool)) if pool > 1 else x
    return fc.apply_mlp(head, x.reshape(-1))


@partial(jax.jit, static_argnums=0)
def jax_batch(network: Network, params: Any, image: jax.Array, corners: jax.Array) -> jax.Array:
    def one(corner: jax.Array) -> jax.Array:
        shape = (network.window, network.window, network.channels)
        return apply(network, params, lax.dynamic_slice(image, (corner[0], corner[1], 0), shape))

    return jax.vmap(one)(corners)


def jax_windows(
    network: Network, params: Any, image: jax.Array, batch: int, corners: np.ndarray
) -> list[jax.Array]:
    """A Python loop: inside `lax.map`, XLA's CPU convolutions are several times slower."""
    starts = range(0, len(corners), batch)
    return [jax_batch(network, params, image, corners[i : i + batch]) for i in starts]


class Torch:
    """The same weights in PyTorch, for windows in batches and rewritten with dilations."""

    def __init__(self, network: Network, params: Any) -> None:
        """Converts the weights, the fully connected ones to convolutions."""
        self.network = network
        convs, head = params
        arrays = fc.interop.to_torch(
            {"convs": convs, "head": fc.mlp_to_conv(head, self._map(network))}
        )
        self.arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for name, array in self.arrays.items():
            if array.ndim == 4:
                self.arrays[name] = array.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _map(network: Network) -> tuple[int, int]:
        size = network.window
        for kernel, _, pool in network.convs:
            size = (size - kernel + 1) // pool
        return size, size

    def __call__(self, x: torch.Tensor, *, dilated: bool) -> torch.Tensor:
        """Scores of images (N, C, H, W): of one window each, or of every window."""
        dilation = 1

        def conv(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
            return F.conv2d(x, weight, bias, dilation=dilation)

        for i, (_, _, pool) in enumerate(self.network.convs):
            x = F.relu(conv(x, f"convs.{i}"))
            if pool > 1:
                x = F.max_pool2d(x, pool, 1 if dilated else pool, dilation=dilation)
                dilation *= pool if dilated else 1
        for i in range(len(self.network.head)):
            x = conv(F.relu(x) if i else x, f"head.{i}")
        return x


def torch_windows(network: Torch, image: torch.Tensor, batch: int, corners: np.ndarray) -> None:
    size = network.network.window
    views = image.unfold(2, size, 1).unfold(3, size, 1)[0]
    with torch.no_grad():
        for start in range(0, len(corners), batch):
            rows, columns = corners[start : start + batch].T
            windows = views[:, rows, columns].movedim(0, 1)
            network(windows.contiguous(memory_format=torch.channels_last), dilated=False)


def needed_flops(network: Network, shape: tuple[int, int]) -> float:
    """Products that sharing needs, two operations each: every layer once at every position."""
    flops, dilation, inputs = 0, 1, network.channels
    height, width = shape
    size = network.window
    for kernel, outputs, pool in network.convs:
        height, width = (n - (kernel - 1) * dilation for n in (height, width))
        flops += 2 * height * width * kernel**2 * inputs * outputs
        height, width = (n - (pool - 1) * dilation for n in (height, width))
        size, inputs, dilation = (size - kernel + 1) // pool, outputs, dilation * pool
    height, width = (n - (size - 1) * dilation for n in (height, width))
    sizes = [size**2 * inputs, *network.head]
    flops += sum(2 * height * width * a * b for a, b in pairwise(sizes))
    return flops


def peak_flops() -> float:
    """Operations per second of a matrix product."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    (seconds,) = timing.time_side_by_side(
        {"product": lambda: product(a, a).block_until_ready()}
    ).values()
    return 2 * 2048**3 / seconds


def seconds_for_all(call: Callable[[np.ndarray], Any], corners: np.ndarray) -> float:
    """Time of a call on 512 of the windows, after one to compile, scaled to all of them."""
    some = np.random.default_rng(0).permutation(corners)[:512]
    jax.block_until_ready(call(some))
    start = time.perf_counter()
    jax.block_until_ready(call(some))
    return (time.perf_counter() - start) * len(corners) / len(some)


def print_memory(compiled: Any) -> None:
    """Temporaries and results of a compiled program."""
    memory = compiled.memory_analysis()
    tqdm.write(
        f"{memory.temp_size_in_bytes / 1e6:.0f} MB of temporaries, "
        f"{memory.output_size_in_bytes / 1e6:.0f} MB of results"
    )


def measure(network: Network, shape: tuple[int, int], rounds: int) -> dict[str, float]:
    params = init(network)
    image = jnp.asarray(
        np.random.default_rng(0).standard_normal((*shape, network.channels), np.float32)
    )
    torch_network, torch_image = (
        Torch(network, params),
        torch.tensor(np.asarray(image)).movedim(-1, 0)[None],
    )
    torch_image = torch_image.contiguous(memory_format=torch.channels_last)
    window = (network.window, network.window)
    sliding = jax.jit(fc.slide(partial(apply, network), window)).lower(params, image).compile()

    def dilated() -> torch.Tensor:
        with torch.no_grad():
            return torch_network(torch_image, dilated=True)

    np.testing.assert_allclose(
        sliding(params, image), dilated()[0].movedim(0, -1), rtol=1e-3, atol=1e-4
    )
    times = timing.time_side_by_side(
        {"fclayers": lambda: sliding(params, image).block_until_ready(), "torch dilated": dilated},
        rounds=rounds,
    )
    counts = [n - network.window + 1 for n in shape]
    corners = np.indices(counts).reshape(2, -1).T
    times["windows"] = min(
        seconds_for_all(partial(jax_windows, network, params, image, batch), corners)
        for batch in (1, 4, 16, 64)
    )
    times["torch windows"] = min(
        seconds_for_all(partial(torch_windows, torch_network, torch_image, batch), corners)
        for batch in (1, 4, 16, 64)
    )
    times["peak"] = needed_flops(network, shape) / peak_flops()
    print_memory(sliding)
    return times


def measure_vgg(rounds: int) -> dict[str, float]:
    """VGG-16 at its own stride, padded at the image's border; windows are padded one by one."""
    params = fc.models.vgg.init_vgg16(jax.random.key(0))
    image = jax.random.normal(jax.random.key(1), (448, 448, 3))
    sliding = fc.slide(fc.models.vgg.apply_vgg16, (224, 224), stride=32, edges="image")
    convs = [conv for block in params.features for conv in block]
    arrays = fc.interop.to_torch(
        {"convs": convs, "head": fc.mlp_to_conv(params.classifier, (7, 7))}
    )
    tensors = {
        name: torch.from_numpy(array).contiguous(
            memory_format=torch.channels_last if array.ndim == 4 else torch.contiguous_format
        )
        for name, array in arrays.items()
    }
    pixels = torch.tensor(np.asarray(image)).movedim(-1, 0)[None]
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def by_torch() -> torch.Tensor:
        x, index = pixels, 0
        with torch.no_grad():
            for block in params.features:
                for _ in block:
                    weight, bias = (tensors[f"convs.{index}.{part}"] for part in ("weight", "bias"))
                    x, index = F.relu(F.conv2d(x, weight, bias, padding=1)), index + 1
                x = F.max_pool2d(x, 2)
            for i in range(3):
                x = F.relu(x) if i else x
                x = F.conv2d(x, tensors[f"head.{i}.weight"], tensors[f"head.{i}.bias"])
        return x

    compiled = jax.jit(sliding).lower(params, image).compile()
    by_hand = jax.jit(fc.models.vgg.vgg16_score_map)
    expected = by_torch()[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(
        compiled(params, image), expected, atol=1e-3 * np.abs(expected).max()
    )
    times = timing.time_side_by_side(
        {
            "fclayers": lambda: compiled(params, image).block_until_ready(),
            "torch dilated": by_torch,
            "score map by hand": lambda: by_hand(params, image).block_until_ready(),
        },
        rounds=rounds,
    )
    print_memory(compiled)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case")
    parser.add_argument("--only", default="", help="run the networks whose names contain this")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/slide.json"))
    args = parser.parse_args()
    results = {}
    cases = [case for case in CASES if args.only in case[0]]
    for name, shape in tqdm(cases, unit="case"):
        results[f"{name} on {shape[0]}×{shape[1]}"] = measure(NETWORKS[name], shape, args.rounds)
    if args.only in "VGG-16":
        results["VGG-16, stride 32, on 448×448"] = measure_vgg(args.rounds)
    results |= slide_padded.measure_cases(args.only, args.rounds)
    print(timing.format_table(results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
