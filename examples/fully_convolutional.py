"""Train a digit classifier on 8×8 windows and slide it over a page, as one convolution.

A small convolutional network with a fully connected head learns to tell the digits that
scikit-learn bundles from paper. `fc.mlp_to_conv` turns the head into convolutions of the same
numbers. The network then takes a page of any size and gives the scores of every window in one
pass; they equal those of the classifier on each window cut out. `fc.slide` does the same to the
classifier as it is. Run it with `python examples/fully_convolutional.py`; `--help` explains the
flags.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
PAPER = 10  # the class of windows without a digit in the middle
IGNORED = -1  # windows two pixels off a digit: either answer is fair
BATCH_SIZE = 256
DROPOUT_RATE = 0.5
PAPER_PER_DIGIT = 1
TRAINING_PAGE = (520, 680)
TOLERANCE = 1e-4


class Page(NamedTuple):
    """Ink (height, width) in [0, 1], and row, column and label (N, 3) of each digit."""

    ink: np.ndarray
    digits: np.ndarray


class Classifier(NamedTuple):
    """Convolutions, then a head of fully connected layers or of the convolutions they become."""

    convs: tuple[fc.ConvParams, ...]
    head: tuple[fc.LinearParams, ...] | tuple[fc.ConvParams, ...]


class State(NamedTuple):
    """What training carries from step to step."""

    params: Classifier
    opt_state: optax.OptState
    key: jax.Array


class Result(NamedTuple):
    """What the run measured."""

    test_accuracy: float
    recall: float
    precision: float
    max_difference: float
    seconds_map: float
    seconds_slide: float
    seconds_windows: float


def load_splits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns images and labels of 1,437 training and 360 test digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, WINDOW, WINDOW).astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=seed
    )
    return (train_x, train_y), (test_x, test_y)


def max_digits(page_size: tuple[int, int]) -> int:
    """How many digits fit on a page wherever the others lie: each blocks 15×15 positions."""
    height, width = page_size
    return (height - WINDOW + 1) * (width - WINDOW + 1) // (2 * WINDOW - 1) ** 2


def compose_page(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, page_size: tuple[int, int]
) -> Page:
    """Places every digit somewhere on a page; they may touch, but not overlap."""
    height, width = page_size
    ink = np.zeros(page_size, np.float32)
    free = np.ones((height - WINDOW + 1, width - WINDOW + 1), bool)
    digits = []
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(free.shape)
        while not free[row, column]:
            row, column = rng.integers(free.shape)
        ink[row : row + WINDOW, column : column + WINDOW] = image
        free[around(row, column, WINDOW - 1)] = False
        digits.append((row, column, label))
    return Page(ink, np.array(digits))


def around(row: int, column: int, distance: int) -> tuple[slice, slice]:
    """The positions at most so far from one, as an index."""
    return (
        slice(max(row - distance, 0), row + distance + 1),
        slice(max(column - distance, 0), column + distance + 1),
    )


def label_windows(page: Page) -> np.ndarray:
    """The class of every window: a digit's if it is at most one pixel off the middle."""
    height, width = page.ink.shape
    labels = np.full((height - WINDOW + 1, width - WINDOW + 1), PAPER)
    for row, column, _ in page.digits:
        labels[around(row, column, 2)] = IGNORED
    for row, column, label in page.digits:
        labels[around(row, column, 1)] = label
    return labels


def init_classifier(key: jax.Array) -> Classifier:
    """Makes two convolutions, 8×8×1 → 6×6×16 → 4×4×32, and a head 512 → 128 → 11."""
    first_key, second_key, head_key = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    first = fc.init_conv(first_key, (3, 3), 1, 16, weight_init=he)
    second = fc.init_conv(second_key, (3, 3), 16, 32, weight_init=he)
    return Classifier((first, second), fc.init_mlp(head_key, [512, 128, 11], weight_init=he))


def apply_classifier(params: Classifier, windows: jax.Array, **dropout: Any) -> jax.Array:
    """Classifies windows (N, 8, 8): logits (N, 11)."""
    x = windows[..., None]
    for conv in params.convs:
        x = jax.nn.relu(fc.apply_conv(conv, x))
    return fc.apply_mlp(params.head, x.reshape(len(x), -1), **dropout)


def to_fully_convolutional(params: Classifier) -> Classifier:
    """The same network with a head of convolutions, 4×4×32 → 128 and 1×1×128 → 11."""
    return params._replace(head=fc.mlp_to_conv(params.head, (4, 4)))


@jax.jit
def score_map(params: Classifier, ink: jax.Array) -> jax.Array:
    """Logits of every window of a page, (height - 7, width - 7, 11), in one pass."""
    x = ink[..., None]
    for conv in (*params.convs, *params.head[:-1]):
        x = jax.nn.relu(fc.apply_conv(conv, x))
    return fc.apply_conv(params.head[-1], x)


@jax.jit
def slide_classifier(params: Classifier, ink: jax.Array) -> jax.Array:
    """The same logits without a conversion by hand: the classifier, at every window."""

    def classify(params: Classifier, window: jax.Array) -> jax.Array:
        return apply_classifier(params, window[None])[0]

    return fc.slide(classify, (WINDOW, WINDOW))(params, ink)


@jax.jit
def score_windows(params: Classifier, ink: jax.Array) -> jax.Array:
    """The same logits from the classifier as it was trained, every window cut out."""
    rows, columns = (size - WINDOW + 1 for size in ink.shape)

    def score_row(row: jax.Array) -> jax.Array:
        corners = jnp.stack([jnp.full(columns, row), jnp.arange(columns)], 1)
        return apply_classifier(params, cut_windows(ink, corners))

    return lax.map(score_row, jnp.arange(rows))


def cut_windows(ink: jax.Array, corners: jax.Array) -> jax.Array:
    """The windows (N, 8, 8) of a page with their first pixels at corners (N, 2)."""
    return jax.vmap(lambda corner: lax.dynamic_slice(ink, corner, (WINDOW, WINDOW)))(corners)


def loss_fn(params: Classifier, windows: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the windows that are not ignored, with dropout in the head."""
    logits = apply_classifier(params, windows, dropout_rate=DROPOUT_RATE, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(where=labels != IGNORED)


@jax.jit
def draw_batches(page: Page, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Windows and labels of an epoch in batches: every digit of a page once, and any windows."""
    shift_key, paper_key, shuffle_key = jax.random.split(key, 3)
    num_digits = len(page.digits)
    last = jnp.array(labels.shape) - 1
    shifts = jax.random.randint(shift_key, (num_digits, 2), -1, 2)
    on_digits = jnp.clip(page.digits[:, :2] + shifts, 0, last)
    anywhere = jax.random.randint(paper_key, (PAPER_PER_DIGIT * num_digits, 2), 0, last + 1)
    corners = jax.random.permutation(shuffle_key, jnp.concatenate([on_digits, anywhere]))
    num_batches = len(corners) // BATCH_SIZE
    corners = corners[: num_batches * BATCH_SIZE]
    windows = cut_windows(page.ink, corners).reshape(num_batches, BATCH_SIZE, WINDOW, WINDOW)
    return windows, labels[corners[:, 0], corners[:, 1]].reshape(num_batches, BATCH_SIZE)


# One call per step: on CPUs, XLA runs convolutions inside a `lax.scan` several times slower.
@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def train_step(
    state: State, windows: jax.Array, labels: jax.Array, *, optimizer: optax.GradientTransformation
) -> tuple[State, jax.Array]:
    """Updates the parameters on one batch; returns the new state and the loss."""
    key, dropout_key = jax.random.split(state.key)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, windows, labels, dropout_key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state, key), loss


def train(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, key: jax.Array, epochs: int
) -> Classifier:
    """Trains a classifier on the windows of a page that is composed anew for every epoch."""
    init_key, dropout_key, train_key = jax.random.split(key, 3)
    params = init_classifier(init_key)
    num_steps = epochs * (len(labels) * (1 + PAPER_PER_DIGIT) // BATCH_SIZE)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps), weight_decay=1e-2)
    state = State(params, optimizer.init(params), dropout_key)
    with tqdm(jax.random.split(train_key, epochs), unit="epoch") as progress:
        for epoch_key in progress:
            page = compose_page(rng, images, labels, TRAINING_PAGE)
            batches = draw_batches(page, label_windows(page), epoch_key)
            losses = []
            for windows, window_labels in zip(*batches, strict=True):
                state, loss = train_step(state, windows, window_labels, optimizer=optimizer)
                losses.append(loss)
            progress.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
    return state.params


def detect(logits: jax.Array) -> np.ndarray:
    """Row, column and label (N, 3) of the windows that look most like a digit around them."""
    # A digit is one also to the windows a pixel off, strokes of two neighbours are not.
    mean = np.asarray(fc.avg_pool(logits, 3, stride=1, padding=1, count_include_pad=False))
    digits = np.delete(mean, PAPER, -1)
    score = np.logaddexp.reduce(digits, -1) - mean[..., PAPER]
    found = []
    # Above zero a digit is likelier than paper.
    while score.max() > 0:
        row, column = np.unravel_index(score.argmax(), score.shape)
        found.append((row, column, digits[row, column].argmax()))
        score[around(row, column, WINDOW // 2)] = -np.inf
    return np.array(found).reshape(-1, 3)


def match(found: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Which detection (rows) is right about which digit (columns): the label, and an IoU ≥ 1/2."""
    offsets = np.abs(found[:, None, :2] - digits[None, :, :2])
    shared = np.clip(WINDOW - offsets, 0, None).prod(-1)
    overlap = shared / (2 * WINDOW**2 - shared)
    return (overlap >= 0.5) & (found[:, None, 2] == digits[None, :, 2])


def median_seconds(function: Callable[[], jax.Array], repeats: int = 5) -> float:
    """Time of a call that has been compiled before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def plot(path: Path, page: Page, logits: jax.Array, found: np.ndarray, right: np.ndarray) -> None:
    """Writes a picture: the page, what was found on it, and the score map of every digit."""
    height, width = page.ink.shape
    on_page = (-0.5, width - 0.5, height - 0.5, -0.5)
    heights = (7.5 * height / width + 0.35, 6 * height / width + 0.75)
    figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)

    left, middle = top.subplots(1, 2)
    left.imshow(page.ink, cmap="gray_r")
    left.set_title(f"A page of {len(page.digits)} digits never seen in training")
    middle.imshow(page.ink, cmap="gray_r", vmax=4)
    missed = page.digits[~right.any(0)]
    middle.set_title(
        f"Found by one pass: {right.any(1).sum()} right (green), "
        f"{(~right.any(1)).sum()} wrong (red), {len(missed)} missed (dotted)"
    )
    for row, column, _ in missed:
        draw_box(middle, row, column, color="tab:orange", linestyle=":", linewidth=5)
    for (row, column, label), is_right in zip(found, right.any(1), strict=True):
        color = "tab:green" if is_right else "tab:red"
        draw_box(middle, row, column, color=color, linewidth=1.2)
        place = (column + 3.5, row + 3.6)
        style = {"ha": "center", "va": "center", "fontsize": 9, "fontweight": "bold"}
        middle.text(*place, str(label), color=color, **style)

    bottom.suptitle("Score maps: the probability that the window around a pixel holds the digit")
    probabilities = np.asarray(jax.nn.softmax(logits))
    middles = np.array([-0.5, width - WINDOW + 0.5, height - WINDOW + 0.5, -0.5]) + (WINDOW - 1) / 2
    for label, axes in enumerate(bottom.subplots(2, 5).flat):
        axes.imshow(page.ink, cmap="gray_r", vmax=5, extent=on_page)
        score = probabilities[..., label]
        axes.imshow(score, cmap="Reds", alpha=score, extent=middles, vmin=-0.5, vmax=1.0)
        axes.set(xlim=on_page[:2], ylim=on_page[2:])
        axes.set_title(str(label), fontsize=10, pad=3)

    for axes in (*top.axes, *bottom.axes):
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_box(axes: plt.Axes, row: int, column: int, **style: Any) -> None:
    """Outlines a window."""
    axes.add_patch(plt.Rectangle((column - 0.5, row - 0.5), WINDOW, WINDOW, fill=False, **style))


def main(argv: list[str] | None = None) -> Result:
    """Trains, converts, compares, detects, draws; returns what it measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=80, help="passes over the training digits")
    parser.add_argument("--seed", type=int, default=0, help="of split, pages and training")
    parser.add_argument(
        "--page-size", type=int, nargs=2, default=[160, 240], metavar=("H", "W"), help="in pixels"
    )
    parser.add_argument("--digits", type=int, default=150, help="test digits on the page")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/fully_convolutional.png"),
        help="where the picture goes",
    )
    args = parser.parse_args(argv)

    (train_x, train_y), (test_x, test_y) = load_splits(args.seed)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if min(args.page_size) < WINDOW:
        parser.error(f"--page-size must be at least {WINDOW} {WINDOW}")
    limit = min(len(test_y), max(1, max_digits(args.page_size)))
    if not 1 <= args.digits <= limit:
        parser.error(f"--digits must be between 1 and {limit} on a page of this size")

    rng = np.random.default_rng(args.seed)
    print(f"Training on pages of {len(train_y)} digits")
    classifier = train(train_x, train_y, rng, jax.random.key(args.seed), args.epochs)
    predictions = apply_classifier(classifier, jnp.asarray(test_x)).argmax(-1)
    test_accuracy = float((predictions == test_y).mean())

    page = compose_page(rng, test_x[: args.digits], test_y[: args.digits], tuple(args.page_size))
    ink = jnp.asarray(page.ink)
    convolution = to_fully_convolutional(classifier)
    logits, cut_out = score_map(convolution, ink), score_windows(classifier, ink)
    for scores in (logits, slide_classifier(classifier, ink)):
        np.testing.assert_allclose(scores, cut_out, rtol=TOLERANCE, atol=TOLERANCE)
    found = detect(logits)
    right = match(found, page.digits)
    result = Result(
        test_accuracy=test_accuracy,
        recall=float(right.any(0).mean()),
        precision=float(right.any(1).mean()) if len(found) else 0.0,
        max_difference=float(jnp.abs(logits - cut_out).max()),
        seconds_map=median_seconds(lambda: score_map(convolution, ink)),
        seconds_slide=median_seconds(lambda: slide_classifier(classifier, ink)),
        seconds_windows=median_seconds(lambda: score_windows(classifier, ink)),
    )
    plot(args.output, page, logits, found, right)

    rows, columns, _ = logits.shape
    print(f"\nTest accuracy {test_accuracy:.1%} on {len(test_y)} digits never seen in training")
    print(f"Score map     {rows}×{columns} = {rows * columns:,} windows of the page")
    print(f"  as one convolution   {result.seconds_map * 1e3:6.1f} ms")
    print(f"  by fc.slide          {result.seconds_slide * 1e3:6.1f} ms")
    print(
        f"  every window cut out {result.seconds_windows * 1e3:6.1f} ms, "
        f"{result.seconds_windows / result.seconds_map:.1f} times as long"
    )
    print(f"  largest difference   {result.max_difference:.1e} (tolerance {TOLERANCE:.0e})")
    print(f"Detections    recall {result.recall:.1%}, precision {result.precision:.1%}")
    print(f"Picture       {args.output.resolve()}")
    return result


if __name__ == "__main__":
    main()
