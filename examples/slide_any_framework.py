"""Slide classifiers of Flax, Equinox and Haiku over a page of digits, with no change to them.

In each framework a small network for windows of 8×8 pixels learns the digits that scikit-learn
bundles. Its convolutions pad with zeros, as Flax's and Haiku's do by default. `fc.slide` then runs
it at every pixel of a page, and computes once what windows share. The scores are those of the
windows cut out, each padded on its own. It needs the `peers` and `examples` extras; run it with
`python examples/slide_any_framework.py`; `--help` explains the flags.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from common import digits, parser, positive, save_picture
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pages import (
    PAPER,
    WINDOW,
    Classify,
    Page,
    compose_page,
    median_seconds,
    score_windows,
    train_on_pages,
)

import fclayers as fc

TRAINING_PAGES = 1
PAGE_SIZE = (104, 156)
NUM_DIGITS = 60
TOLERANCE = 1e-4


class Result(NamedTuple):
    """What the run measured, one entry per framework."""

    max_differences: tuple[float, ...]
    seconds_slide: tuple[float, ...]
    seconds_windows: tuple[float, ...]


def flax_model(key: jax.Array) -> tuple[Classify, Any]:
    """Makes the network in Flax Linen, channels last."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, window: jax.Array) -> jax.Array:
            x = nn.relu(nn.Conv(8, (3, 3))(window[..., None]))
            x = nn.relu(nn.Conv(16, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            return nn.Dense(11)(nn.relu(nn.Dense(64)(x.ravel())))

    model = Classifier()
    return model.apply, model.init(key, jnp.ones((WINDOW, WINDOW)))


def equinox_model(key: jax.Array) -> tuple[Classify, Any]:
    """Makes the network in Equinox, channels first."""
    keys = jax.random.split(key, 3)
    layers = [
        *(eqx.nn.Conv2d(1, 8, 3, padding="SAME", key=keys[0]), eqx.nn.Lambda(jax.nn.relu)),
        *(eqx.nn.Conv2d(8, 16, 3, padding="SAME", key=keys[1]), eqx.nn.Lambda(jax.nn.relu)),
        *(eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel)),
        eqx.nn.MLP(4 * 4 * 16, 11, 64, depth=1, key=keys[2]),
    ]
    params, rest = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return lambda params, window: eqx.combine(params, rest)(window[None]), params


def haiku_model(key: jax.Array) -> tuple[Classify, Any]:
    """Makes the network in Haiku, channels last."""

    def forward(window: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(8, 3)(window[..., None]))
        x = jax.nn.relu(hk.Conv2D(16, 3)(x))
        x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
        return hk.nets.MLP([64, 11])(x.ravel())

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(key, jnp.ones((WINDOW, WINDOW)))


def plot(path: Path, page: Page, scores: dict[str, jax.Array]) -> None:
    """Draws the page, and what every model sees around every pixel of it."""
    height, width = page.ink.shape
    figure = Figure(figsize=(15, 14 * height / width + 0.8), layout="constrained")
    first, *rest = figure.subplots(2, 2).flat
    colors = list(colormaps["tab10"].colors)
    colors[7] = "black"  # gray is the page's
    palette = ListedColormap(colors)
    first.imshow(page.ink, cmap="gray_r", extent=(0, width, height, 0))
    first.set_title("Digits never seen in training, boxed in the color of their class")
    for row, column, label in page.digits:
        style = {"fill": False, "linewidth": 2, "color": palette(label)}
        first.add_patch(Rectangle((column, row), WINDOW, WINDOW, **style))
    middles = np.array([0, width - WINDOW + 1, height - WINDOW + 1, 0]) + (WINDOW - 1) / 2
    for axes, (name, logits) in zip(rest, scores.items(), strict=True):
        probabilities = np.asarray(jax.nn.softmax(logits))
        seen = palette(probabilities[..., :PAPER].argmax(-1))
        seen[..., 3] = 1 - probabilities[..., PAPER]
        axes.imshow(page.ink, cmap="gray_r", vmax=3.5, extent=(0, width, height, 0))
        axes.imshow(seen, extent=middles)
        axes.set_title(f"{name}: the digit in the window around each pixel")
    for axes in (first, *rest):
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    bar = ScalarMappable(Normalize(-0.5, 9.5), palette)
    figure.colorbar(bar, ax=[first, *rest], ticks=range(10), aspect=40, pad=0.01)
    save_picture(figure, path)


def main(argv: list[str] | None = None) -> Result:
    """Trains, slides, compares, draws; returns what it measured."""
    flags = parser(__doc__, "outputs/slide_any_framework.png")
    flags.add_argument("--epochs", type=positive, default=3, help="passes over all windows")
    args = flags.parse_args(argv)

    data, val, test = digits(args.seed)
    shown = jax.tree.map(lambda a: a[:NUM_DIGITS], test)
    page = compose_page(np.random.default_rng(args.seed), shown, PAGE_SIZE)
    ink = jnp.asarray(page.ink)
    measured, scores = [], {}
    makers = (("Flax", flax_model), ("Equinox", equinox_model), ("Haiku", haiku_model))
    for name, make_model in makers:
        print(f"Training the classifier of {name}", flush=True)
        classify, params = make_model(jax.random.key(args.seed))
        options = {"pages": TRAINING_PAGES, "epochs": args.epochs, "seed": args.seed}
        params = train_on_pages(classify, params, data, val, **options)
        slide = partial(jax.jit(fc.slide(classify, (WINDOW, WINDOW))), params)
        cut_out = partial(score_windows, classify, params)
        scores[name], expected = slide(ink), cut_out(ink)
        np.testing.assert_allclose(scores[name], expected, rtol=TOLERANCE, atol=TOLERANCE)
        difference = float(jnp.abs(scores[name] - expected).max())
        fast, slow = (median_seconds(partial(way, ink)) for way in (slide, cut_out))
        measured.append((difference, fast, slow))

    print(f"\nEvery window of a page of {PAGE_SIZE[0]}×{PAGE_SIZE[1]} pixels")
    for name, (difference, fast, slow) in zip(scores, measured, strict=True):
        print(
            f"{name:8} fc.slide {fast * 1e3:.1f} ms, cut out {slow * 1e3:.1f} ms, "
            f"{slow / fast:.1f} times as long; largest difference {difference:.1e}"
        )
    plot(args.output, page, scores)
    return Result(*zip(*measured, strict=True))


if __name__ == "__main__":
    main()
