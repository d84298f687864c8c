"""Where the time of `slide` goes: every layer of a network beside the products it needs at peak.

`python benchmarks/slide_steps.py` (the `peers` and `examples` extras) times, for the networks of
`slide.py`, `jit(slide(f))` cut after every layer; a layer's time is the difference to the cut
before. Beside it stand the layer's products at the speed of a 2048×2048 matrix product of this run.
The times of the cases run by `--only` replace those in the file of earlier runs; the picture shows
all of them.
"""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import timing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from slide import CASES, NETWORKS, Network, apply, init, needed_flops, peak_flops
from tqdm import tqdm

import fclayers as fc

Layers = dict[str, dict[str, float]]

IMAGE = Path(__file__).parents[1] / "docs/images/slide_steps.svg"
INK, QUIET, GRID = "#222222", "#666666", "#b9c8d6"
BLUE, BROWN = "#1f4e79", "#a8400c"


def cuts(network: Network) -> dict[str, Network]:
    """The network up to every layer; what is left of it takes a smaller window."""
    parts = {}
    for i, (kernel, outputs, pool) in enumerate(network.convs):
        before = network.convs[:i]
        parts[f"convolution {i + 1}, {kernel}×{kernel}"] = [*before, (kernel, outputs, 1)]
        if pool > 1:
            parts[f"pool {i + 1}"] = [*before, (kernel, outputs, pool)]
    by_name = {
        name: Network(_window(convs), network.channels, convs, ()) for name, convs in parts.items()
    }
    for i, features in enumerate(network.head):
        name = f"fully connected {i + 1}, {features}"
        by_name[name] = network._replace(head=network.head[: i + 1])
    return by_name


def _window(convs: list[tuple[int, int, int]]) -> int:
    """The size of a window with one output."""
    size = 1
    for kernel, _, pool in reversed(convs):
        size = size * pool + kernel - 1
    return size


def apply_cut(network: Network, params: Any, window: jax.Array) -> jax.Array:
    if network.head:
        return apply(network, params, window)
    x = window
    for conv, (_, _, pool) in zip(params[0], network.convs, strict=True):
        x = jax.nn.relu(fc.apply_conv(conv, x))
        x = fc.max_pool(x, (pool, pool)) if pool > 1 else x
    return x.reshape(-1)


def measure(network: Network, shape: tuple[int, int], rounds: int) -> Layers:
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((*shape, network.channels), np.float32))
    calls, flops = {}, [0.0]
    for name, cut in cuts(network).items():
        params = init(cut) if cut.head else (init(network)[0][: len(cut.convs)], ())
        window = (cut.window, cut.window)
        compiled = jax.jit(fc.slide(partial(apply_cut, cut), window)).lower(params, image).compile()
        calls[name] = partial(_ready, compiled, params, image)
        flops.append(needed_flops(cut, shape))
    times = timing.time_side_by_side(calls, rounds=rounds)
    peak = peak_flops()
    seconds = np.diff([0.0, *times.values()])
    return {
        name: {"seconds": float(spent), "products": (after - before) / peak}
        for name, spent, (before, after) in zip(calls, seconds, pairwise(flops), strict=True)
    }


def _ready(call: Any, *args: Any) -> Any:
    return jax.block_until_ready(call(*args))


def draw(results: Mapping[str, Layers]) -> Figure:
    height = -(-len(results) // 2)
    figure = Figure(figsize=(8.2, 2.7 * height), layout="constrained")
    grid = figure.subplots(height, 2)
    rows = max(map(len, results.values()))
    for axes, (case, layers) in zip(grid.flat, results.items(), strict=False):
        _draw_case(axes, case, layers)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xlabel("milliseconds")
    for axes in grid.flat[len(results) :]:
        axes.set_axis_off()
    grid[0, 0].legend(loc="lower right", frameon=False)
    return figure


def _draw_case(axes: Axes, case: str, layers: Layers) -> None:
    places = np.arange(len(layers))
    times, products = (
        np.array([layer[key] for layer in layers.values()]) * 1e3 for key in ("seconds", "products")
    )
    axes.barh(places - 0.2, times, 0.4, color=BLUE, label="measured")
    axes.barh(places + 0.2, products, 0.4, color=BROWN, label="its products at peak")
    axes.set_yticks(places, layers)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.set_title(f"{case}: {times.sum():.3g} ms", loc="left", fontweight="bold", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds per case")
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/slide_steps.json"))
    parser.add_argument("--image", type=Path, default=IMAGE)
    args = parser.parse_args()
    names = [f"{name} on {shape[0]}×{shape[1]}" for name, shape in CASES]
    measured = json.loads(args.output.read_text()) if args.output.exists() else {}
    for case, (name, shape) in zip(tqdm(names, unit="case"), CASES, strict=True):
        if args.only in case:
            measured[case] = measure(NETWORKS[name], shape, args.rounds)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(measured, indent=2) + "\n")
    results = {case: measured[case] for case in names if case in measured}
    for case, layers in results.items():
        print(f"\n{case}")
        for name, layer in layers.items():
            print(f"{name:24}{layer['seconds'] * 1e3:8.2f} ms {layer['products'] * 1e3:8.2f} ms")
    if len(results) == len(names):
        style = {"font.size": 8.5, "text.color": INK, "svg.hashsalt": "fclayers"}
        with mpl.rc_context(style):
            draw(results).savefig(args.image, metadata={"Date": None})


if __name__ == "__main__":
    main()
