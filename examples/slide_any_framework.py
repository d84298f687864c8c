"""Slide classifiers of Flax, Equinox and Haiku over a page of digits, models as they are.

In each framework a small network for windows of 8×8 pixels learns the digits that scikit-learn
bundles. `fc.slide` then runs it at every pixel of a page, and computes once what windows share.
The scores are those of the windows cut out. It needs the `peers` and `examples` extras; run it with
`python examples/slide_any_framework.py`; `--help` explains the flags.
"""

import argparse
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fclayers as fc

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 8
CELL = 13  # a digit lies somewhere in a cell of this size
PAPER = 10  # the class of windows without a digit in the middle
TOLERANCE = 1e-4

# Logits (11,) of a window (8, 8): `classify(params, window)`.
Classify = Callable[[Any, jax.Array], jax.Array]


class Page(NamedTuple):
    """Ink (height, width) in [0, 1], first pixel (N, 2) of each digit, class of every window."""

    ink: np.ndarray
    corners: np.ndarray
    classes: np.ndarray


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
            x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(window[..., None]))
            x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            return nn.Dense(11)(nn.relu(nn.Dense(64)(x.ravel())))

    model = Classifier()
    return model.apply, model.init(key, jnp.ones((WINDOW, WINDOW)))


def equinox_model(key: jax.Array) -> tuple[Classify, Any]:
    """Makes the network in Equinox, channels first."""
    keys = jax.random.split(key, 3)
    layers = [
        *(eqx.nn.Conv2d(1, 16, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu)),
        *(eqx.nn.Conv2d(16, 32, 3, key=keys[1]), eqx.nn.Lambda(jax.nn.relu)),
        *(eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel)),
        eqx.nn.MLP(2 * 2 * 32, 11, 64, depth=1, key=keys[2]),
    ]
    params, rest = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return lambda params, window: eqx.combine(params, rest)(window[None]), params


def haiku_model(key: jax.Array) -> tuple[Classify, Any]:
    """Makes the network in Haiku, channels last."""

    def forward(window: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(16, 3, padding="VALID")(window[..., None]))
        x = jax.nn.relu(hk.Conv2D(32, 3, padding="VALID")(x))
        x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
        return hk.nets.MLP([64, 11])(x.ravel())

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(key, jnp.ones((WINDOW, WINDOW)))


def compose_page(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, cells: tuple[int, int]
) -> Page:
    """Places a digit in every cell; a window at most one pixel off it counts as the digit."""
    ink = np.zeros((cells[0] * CELL, cells[1] * CELL), np.float32)
    classes = np.full([size - WINDOW + 1 for size in ink.shape], PAPER)
    corners = CELL * np.argwhere(np.ones(cells))
    corners += rng.integers(CELL - WINDOW + 1, size=corners.shape)
    for (row, column), image, label in zip(corners, images, labels, strict=False):
        ink[row : row + WINDOW, column : column + WINDOW] = image
        classes[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = label
    return Page(ink, corners, classes)


def classify_at(classify: Classify, params: Any, ink: jax.Array, corner: jax.Array) -> jax.Array:
    """Classifies one window, cut out of a page at its first pixel."""
    return classify(params, lax.dynamic_slice(ink, corner, (WINDOW, WINDOW)))


def train(name: str, classify: Classify, params: Any, page: Page, steps: int, seed: int) -> Any:
    """Trains on a page; half of a batch are windows on digits, half lie anywhere."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)
    ink, rng, ends = jnp.asarray(page.ink), np.random.default_rng(seed), page.classes.shape

    def loss_fn(params: Any, corners: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jax.vmap(partial(classify_at, classify, params, ink))(corners)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def train_step(params: Any, opt_state: Any, *batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    with tqdm(range(steps), desc=name, unit="step") as progress:
        for _ in progress:
            at = np.concatenate([rng.choice(page.corners, 128), rng.integers(ends, size=(128, 2))])
            at = np.clip(at + rng.integers(-1, 2, at.shape), 0, np.array(ends) - 1)
            params, opt_state, loss = train_step(params, opt_state, at, page.classes[tuple(at.T)])
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return params


def score_windows(classify: Classify, params: Any, ink: jax.Array) -> jax.Array:
    """What `fc.slide` replaces: cuts out every window of a page and classifies it, in batches."""
    counts = [size - WINDOW + 1 for size in ink.shape]
    corners = jnp.indices(counts).reshape(2, -1).T
    scores = lax.map(partial(classify_at, classify, params, ink), corners, batch_size=1024)
    return scores.reshape(*counts, -1)


def median_seconds(function: Callable[[], jax.Array]) -> float:
    """Time of a call that has been compiled before."""
    return float(np.median(timeit.repeat(lambda: function().block_until_ready(), number=1)))


def plot(path: Path, page: Page, scores: dict[str, jax.Array]) -> None:
    """Writes a picture: the page, and what every model sees around every pixel of it."""
    height, width = page.ink.shape
    figure = plt.figure(figsize=(15, 14 * height / width + 0.8), layout="constrained")
    first, *rest = figure.subplots(2, 2).flat
    colors = list(plt.colormaps["tab10"].colors)
    colors[7] = "black"  # gray is the page's
    palette = matplotlib.colors.ListedColormap(colors)
    first.imshow(page.ink, cmap="gray_r", extent=(0, width, height, 0))
    first.set_title("Digits never seen in training, boxed in the color of what they are")
    for row, column in page.corners:
        style = {"fill": False, "linewidth": 2, "color": palette(page.classes[row, column])}
        first.add_patch(plt.Rectangle((column, row), WINDOW, WINDOW, **style))
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
    bar = plt.cm.ScalarMappable(plt.Normalize(-0.5, 9.5), palette)
    figure.colorbar(bar, ax=[first, *rest], ticks=range(10), aspect=40, pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Result:
    """Trains, slides, compares, draws; returns what it measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of training, per framework")
    parser.add_argument("--seed", type=int, default=0, help="of split, pages and training")
    output = Path("outputs/slide_any_framework.png")
    parser.add_argument("--output", type=Path, default=output, help="where the picture goes")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, WINDOW, WINDOW).astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=args.seed
    )
    rng = np.random.default_rng(args.seed)
    training_page = compose_page(rng, train_x, train_y, (37, 38))
    page = compose_page(rng, test_x, test_y, (8, 12))
    print(f"Every window of a page of {page.ink.shape[0]}×{page.ink.shape[1]} pixels")
    measured, scores = [], {}
    makers = (("Flax", flax_model), ("Equinox", equinox_model), ("Haiku", haiku_model))
    for name, make_model in makers:
        classify, params = make_model(jax.random.key(args.seed))
        params = train(name, classify, params, training_page, args.steps, args.seed)
        slide = jax.jit(fc.slide(classify, (WINDOW, WINDOW)))
        cut_out = jax.jit(partial(score_windows, classify))
        scores[name], expected = slide(params, page.ink), cut_out(params, page.ink)
        np.testing.assert_allclose(scores[name], expected, rtol=TOLERANCE, atol=TOLERANCE)
        difference = float(jnp.abs(scores[name] - expected).max())
        fast, slow = (median_seconds(partial(f, params, page.ink)) for f in (slide, cut_out))
        measured.append((difference, fast, slow))
        print(
            f"{name:8} fc.slide {fast * 1e3:.1f} ms, cut out {slow * 1e3:.1f} ms, "
            f"{slow / fast:.1f} times as long; largest difference {difference:.1e}"
        )
    plot(args.output, page, scores)
    print(f"Picture  {args.output.resolve()}")
    return Result(*zip(*measured, strict=True))


if __name__ == "__main__":
    main()
