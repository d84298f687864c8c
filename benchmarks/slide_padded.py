"""`slide` of networks that pad every window, against windows in batches, in float32.

`python benchmarks/slide_padded.py` (the `examples` extra). The candidates:

- fclayers: `jit(slide(f))`, `f` being the network for one window;
- windows: `f` under `vmap` on windows cut out, jitted, in a loop, by the best of some batch sizes;
- unpadded: `jit(slide(f))` of the same network without padding, where it has the same layers.

Beside the times are the operations that `explain_slide` counts: how many times as many the windows
need, which sharing promises, and how many of them are done per second. Windows in batches take
minutes. They are timed on some of the windows and scaled to all of them.
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
import timing
from jax import lax
from tqdm import tqdm

import fclayers as fc

Network = Callable[[Any, jax.Array], jax.Array]


class Case(NamedTuple):
    """A network for one window, its parameters, where the windows lie, and the same unpadded."""

    network: Network
    params: Any
    window: int
    stride: int
    image: tuple[int, int, int]
    unpadded: Network | None = None


def keys(count: int) -> Sequence[jax.Array]:
    return list(jax.random.split(jax.random.key(0), count))


def convs(widths: Sequence[int], size: int = 3) -> list[fc.ConvParams]:
    """Convolutions of one kernel size, one after the other."""
    pairs = zip(keys(len(widths)), pairwise(widths), strict=False)
    return [fc.init_conv(key, (size, size), a, b) for key, (a, b) in pairs]


def two_convolutions(image: int, window: int) -> Case:
    """Two 3×3 convolutions of 16 maps, a pool and a mean."""

    def network(params: Any, x: jax.Array, padding: Any = "SAME") -> jax.Array:
        for conv in params:
            x = jax.nn.relu(fc.apply_conv(conv, x, padding=padding))
        return fc.max_pool(x, (2, 2)).mean((0, 1))

    unpadded = partial(network, padding="VALID")
    return Case(network, convs((3, 16, 16)), window, 1, (image, image, 3), unpadded)


def ceil_mode() -> Case:
    """A network for 24×24 faces as Caffe has them: its first pool pads a row and a column."""
    params = (
        [
            fc.init_conv(k, (n, n), a, b)
            for k, n, a, b in zip(keys(3), (3, 3, 2), (3, 28, 48), (28, 48, 64), strict=True)
        ],
        fc.init_mlp(jax.random.key(1), [3 * 3 * 64, 128, 2]),
    )

    def network(params: Any, x: jax.Array) -> jax.Array:
        (first, second, third), head = params
        x = jax.nn.relu(fc.apply_conv(first, x))
        x = fc.max_pool(x, (3, 3), stride=2, padding=((0, 1), (0, 1)))
        x = fc.max_pool(jax.nn.relu(fc.apply_conv(second, x)), (3, 3), stride=2)
        x = jax.nn.relu(fc.apply_conv(third, x))
        return fc.apply_mlp(head, x.transpose(2, 1, 0).reshape(-1))

    return Case(network, params, 24, 1, (200, 200, 3))


def four_stages() -> Case:
    """The 95×95 network of `slide.py`, padded."""
    sizes = zip(keys(4), (4, 5, 4, 4), (1, 48, 48, 48), strict=True)
    params = (
        [fc.init_conv(key, (size, size), inputs, 48) for key, size, inputs in sizes],
        fc.init_mlp(jax.random.key(1), [5 * 5 * 48, 200, 2]),
    )

    def network(params: Any, x: jax.Array) -> jax.Array:
        for conv in params[0]:
            x = fc.max_pool(jax.nn.relu(fc.apply_conv(conv, x, padding="SAME")), (2, 2))
        return fc.apply_mlp(params[1], x.reshape(-1))

    return Case(network, params, 95, 1, (256, 256, 1))


def vgg16(stride: int) -> Case:
    """VGG-16 with an eighth of its channels."""
    params = fc.models.vgg.init_vgg16(jax.random.key(0))
    narrow = jax.tree.map(
        lambda a: a[tuple(slice(n // 8 if n >= 64 else n) for n in a.shape)], params
    )
    return Case(fc.models.vgg.apply_vgg16, narrow, 224, stride, (384, 384, 3))


def residual() -> Case:
    """A ResNet of six blocks, twice at half the size."""
    spec = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    params = (
        fc.init_conv(jax.random.key(1), (3, 3), 3, 16),
        [
            (*convs((inputs, width, width)), fc.init_conv(key, (1, 1), inputs, width))
            for key, (inputs, width, _) in zip(keys(6), spec, strict=True)
        ],
        fc.init_linear(jax.random.key(2), 64, 10),
    )

    def network(params: Any, x: jax.Array) -> jax.Array:
        stem, blocks, head = params
        x = jax.nn.relu(fc.apply_conv(stem, x, padding="SAME"))
        for (first, second, project), (inputs, width, stride) in zip(blocks, spec, strict=True):
            y = jax.nn.relu(fc.apply_conv(first, x, stride=stride, padding="SAME"))
            if inputs != width:
                x = fc.apply_conv(project, x, stride=stride)
            x = jax.nn.relu(x + fc.apply_conv(second, y, padding="SAME"))
        return fc.apply_linear(head, x.mean((0, 1)))

    return Case(network, params, 64, 1, (128, 128, 3))


CASES = {
    "2 convs, 32×32 on 160×160": partial(two_convolutions, 160, 32),
    "2 convs, 64×64 on 160×160": partial(two_convolutions, 160, 64),
    "ceil mode, 24×24 on 200×200": ceil_mode,
    "95×95 on 256×256": four_stages,
    "VGG-16 / 8, 224×224, stride 32, on 384×384": partial(vgg16, 32),
    "VGG-16 / 8, 224×224, stride 8, on 384×384": partial(vgg16, 8),
    "ResNet, 64×64 on 128×128": residual,
}


def in_batches(case: Case, image: jax.Array) -> Callable[[int], float]:
    """The time of all windows, by the size of the batches, from that of one batch."""
    counts = [(size - case.window) // case.stride + 1 for size in case.image[:2]]
    corners = np.random.default_rng(0).permutation(np.indices(counts).reshape(2, -1).T)

    @jax.jit
    def run(params: Any, corners: jax.Array) -> jax.Array:
        def one(corner: jax.Array) -> jax.Array:
            start = (corner[0] * case.stride, corner[1] * case.stride, 0)
            return case.network(
                params, lax.dynamic_slice(image, start, (case.window, case.window, image.shape[2]))
            )

        return jax.vmap(one)(corners)

    def seconds(batch: int) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run(case.params, corners[:batch]).block_until_ready()
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:])) * len(corners) / min(batch, len(corners))

    return seconds


def measure(case: Case, rounds: int) -> dict[str, float]:
    image = jnp.asarray(np.random.default_rng(0).standard_normal(case.image, np.float32))
    window = (case.window, case.window)
    candidates = {}
    for name, network in (("fclayers", case.network), ("unpadded", case.unpadded)):
        if network:
            sliding = jax.jit(fc.slide(network, window, stride=case.stride))
            compiled = sliding.lower(case.params, image).compile()
            candidates[name] = lambda run=compiled: run(case.params, image).block_until_ready()
    times = timing.time_side_by_side(candidates, rounds=rounds)
    seconds = in_batches(case, image)
    times["windows"] = min(map(seconds, (1, 4, 16, 64, 256)))
    report = fc.explain_slide(case.network, window, stride=case.stride)(case.params, image)
    ratio, promised = times["windows"] / times["fclayers"], report.flops_windows / report.flops
    tqdm.write(
        f"{ratio:.1f} times as fast as windows, {promised:.1f} by operations; "
        f"{report.flops / times['fclayers'] / 1e9:.0f} GFLOP/s, "
        f"windows {report.flops_windows / times['windows'] / 1e9:.0f}; "
        f"{report.temporary_bytes / 1e6:.0f} MB of temporaries"
    )
    return times


def measure_cases(only: str, rounds: int) -> dict[str, dict[str, float]]:
    """Times by candidate, for the cases whose names contain `only`."""
    results = {}
    for name in tqdm([name for name in CASES if only in name], unit="case"):
        tqdm.write(name)
        results[name] = measure(CASES[name](), rounds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case")
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/slide_padded.json"))
    args = parser.parse_args()
    results = measure_cases(args.only, args.rounds)
    print(timing.format_table(results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
