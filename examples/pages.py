"""Pages of digits and their windows, for the examples that run a classifier at every pixel."""

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Split, train
from jax import lax
from numpy.lib.stride_tricks import sliding_window_view

WINDOW = 8
PAPER = 10  # the class of windows without a digit in the middle
BATCH_SIZE = 64
TRAINING_PAGE = (500, 640)

# Logits (11,) of a window (8, 8): `classify(params, window)`.
Classify = Callable[[Any, jax.Array], jax.Array]


class Page(NamedTuple):
    """Ink (height, width) in [0, 1], and row, column and label (N, 3) of each digit."""

    ink: np.ndarray
    digits: np.ndarray


def max_digits(page_size: tuple[int, int]) -> int:
    """How many digits fit on a page wherever the others lie: each blocks 15×15 positions."""
    height, width = page_size
    return max(1, (height - WINDOW + 1) * (width - WINDOW + 1) // (2 * WINDOW - 1) ** 2)


def compose_page(rng: np.random.Generator, split: Split, page_size: tuple[int, int]) -> Page:
    """Places every digit somewhere on a page; they may touch, but not overlap."""
    ink = np.zeros(page_size, np.float32)
    free = np.ones([size - WINDOW + 1 for size in page_size], bool)
    placed = []
    images = np.asarray(split.images).reshape(-1, WINDOW, WINDOW)
    for image, label in zip(images, np.asarray(split.labels), strict=True):
        row, column = rng.integers(free.shape)
        while not free[row, column]:
            row, column = rng.integers(free.shape)
        ink[row : row + WINDOW, column : column + WINDOW] = image
        free[around(row, column, WINDOW - 1)] = False
        placed.append((row, column, label))
    return Page(ink, np.array(placed))


def around(row: int, column: int, distance: int) -> tuple[slice, slice]:
    """The positions at most so far from one, as an index."""
    return (
        slice(max(row - distance, 0), row + distance + 1),
        slice(max(column - distance, 0), column + distance + 1),
    )


def labeled_windows(rng: np.random.Generator, page: Page) -> Split:
    """Every window at most one pixel off a digit, and as many that lie anywhere.

    Those two pixels off a digit are left out: either answer is fair.
    """
    windows = sliding_window_view(page.ink, (WINDOW, WINDOW))
    labels = np.full(windows.shape[:2], PAPER)
    for row, column, _ in page.digits:
        labels[around(row, column, 2)] = -1
    for row, column, label in page.digits:
        labels[around(row, column, 1)] = label
    on_digits = np.argwhere((labels >= 0) & (labels != PAPER))
    anywhere = rng.integers(labels.shape, size=on_digits.shape)
    chosen = tuple(np.concatenate([on_digits, anywhere]).T)
    fair = labels[chosen] >= 0
    return Split(windows[chosen][fair], labels[chosen][fair])


def train_on_pages(
    classify: Classify,
    params: Any,
    digits: Split,
    val: Split,
    *,
    pages: int,
    epochs: int,
    seed: int,
) -> Any:
    """Trains a classifier of windows on pages of digits, by `fc.train.fit`."""
    rng = np.random.default_rng(seed)
    composed = [compose_page(rng, digits, TRAINING_PAGE) for _ in range(pages)]
    splits = [labeled_windows(rng, page) for page in composed]
    data = Split(*map(np.concatenate, zip(*splits, strict=True)))

    def loss_fn(params: Any, batch: Split, key: jax.Array) -> jax.Array:
        logits = jax.vmap(partial(classify, params))(batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    trained, _ = train(
        params,
        data,
        jax.random.key(seed),
        epochs=epochs,
        batch_size=BATCH_SIZE,
        loss_fn=loss_fn,
        learning_rate=3e-3,
        eval_fn=lambda params: {"accuracy": digit_accuracy(classify, params, val)},
    )
    return trained


@partial(jax.jit, static_argnames="classify")
def digit_accuracy(classify: Classify, params: Any, split: Split) -> jax.Array:
    """Share of digits, each in the middle of its window, that are classified correctly."""
    windows = split.images.reshape(-1, WINDOW, WINDOW)
    return (jax.vmap(partial(classify, params))(windows).argmax(-1) == split.labels).mean()


@partial(jax.jit, static_argnames="classify")
def score_windows(classify: Classify, params: Any, ink: jax.Array) -> jax.Array:
    """Cuts out every window of a page and classifies it, in batches: what `fc.slide` replaces."""
    counts = [size - WINDOW + 1 for size in ink.shape]

    def score(corner: jax.Array) -> jax.Array:
        return classify(params, lax.dynamic_slice(ink, corner, (WINDOW, WINDOW)))

    corners = jnp.indices(counts).reshape(2, -1).T
    return lax.map(score, corners, batch_size=1024).reshape(*counts, -1)


def median_seconds(fun: Callable[[], jax.Array]) -> float:
    """Time of a call that has been compiled before."""
    return float(np.median(timeit.repeat(lambda: fun().block_until_ready(), number=1)))
