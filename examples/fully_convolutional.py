"""Train a digit classifier on 8×8 windows and slide it over a page, as one convolution.

A small convolutional network with a fully connected head learns to tell the digits that
scikit-learn bundles from paper. `fc.mlp_to_conv` converts the head to convolutions with the same
numbers. The network then takes a page of any size and computes the scores of every window in one
pass; they equal those of the classifier on each window cut out. `fc.slide` does the same without a
conversion. Run it with `python examples/fully_convolutional.py`; `--help` explains the flags.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import digits, parser, positive, save_picture
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pages import (
    PAPER,
    WINDOW,
    Page,
    around,
    compose_page,
    digit_accuracy,
    max_digits,
    median_seconds,
    score_windows,
    train_on_pages,
)

import fclayers as fc

TRAINING_PAGES = 4
TOLERANCE = 1e-4


class Classifier(NamedTuple):
    """Convolutions, then a head of fully connected layers or of the convolutions they become."""

    convs: tuple[fc.ConvParams, ...]
    head: tuple[fc.LinearParams, ...] | tuple[fc.ConvParams, ...]


class Result(NamedTuple):
    """What the run measured."""

    test_accuracy: float
    recall: float
    precision: float
    max_difference: float


def init_classifier(key: jax.Array) -> Classifier:
    """Makes two convolutions, 8×8×1 → 6×6×16 → 4×4×32, and a head 512 → 128 → 11."""
    first_key, second_key, head_key = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    first = fc.init_conv(first_key, (3, 3), 1, 16, weight_init=he)
    second = fc.init_conv(second_key, (3, 3), 16, 32, weight_init=he)
    return Classifier((first, second), fc.init_mlp(head_key, [512, 128, 11], weight_init=he))


def classify(params: Classifier, window: jax.Array) -> jax.Array:
    """Classifies a window (8, 8): logits (11,)."""
    x = window[..., None]
    for conv in params.convs:
        x = jax.nn.relu(fc.apply_conv(conv, x))
    return fc.apply_mlp(params.head, x.reshape(-1))


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


def detect(logits: jax.Array) -> np.ndarray:
    """Row, column and label (N, 3) of the windows that look most like a digit around them."""
    # The windows a pixel off a digit show it too; strokes of two neighbors are seen in one only.
    mean = np.asarray(fc.avg_pool(logits, (3, 3), stride=1, padding=1, count_include_pad=False))
    of_digits = np.delete(mean, PAPER, -1)
    score = np.logaddexp.reduce(of_digits, -1) - mean[..., PAPER]
    found = []
    # Above zero a digit is likelier than paper.
    while score.max() > 0:
        row, column = np.unravel_index(score.argmax(), score.shape)
        found.append((row, column, of_digits[row, column].argmax()))
        score[around(row, column, WINDOW // 2)] = -np.inf
    return np.array(found).reshape(-1, 3)


def match(found: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """Which detection (rows) is right about which digit (columns): the label, and an IoU ≥ 1/2."""
    offsets = np.abs(found[:, None, :2] - placed[None, :, :2])
    shared = np.clip(WINDOW - offsets, 0, None).prod(-1)
    return (3 * shared >= 2 * WINDOW**2) & (found[:, None, 2] == placed[None, :, 2])


def plot(path: Path, page: Page, logits: jax.Array, found: np.ndarray, right: np.ndarray) -> None:
    """Draws the page, what was found on it, and the score map of every digit."""
    height, width = page.ink.shape
    heights = (7.5 * height / width + 0.35, 6 * height / width + 0.75)
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)

    left, middle = top.subplots(1, 2)
    left.imshow(page.ink, cmap="gray_r")
    left.set_title(f"A page of {len(page.digits)} digits never seen in training")
    middle.imshow(page.ink, cmap="gray_r", vmax=4)
    found_right, missed = right.any(1), page.digits[~right.any(0)]
    middle.set_title(
        f"Found in one pass: {found_right.sum()} right (green), "
        f"{(~found_right).sum()} wrong (red), {len(missed)} missed (dotted)"
    )
    boxes = [(place, "tab:orange", ":", 5) for place in missed]
    boxes += [
        (place, "tab:green" if ok else "tab:red", "-", 1.2)
        for place, ok in zip(found, found_right, strict=True)
    ]
    for (row, column, label), color, line, thick in boxes:
        style = {"fill": False, "color": color, "linestyle": line, "linewidth": thick}
        middle.add_patch(Rectangle((column - 0.5, row - 0.5), WINDOW, WINDOW, **style))
        if line == "-":
            style = {"color": color, "ha": "center", "va": "center", "size": 9, "weight": "bold"}
            middle.text(column + 3.5, row + 3.6, str(label), **style)

    bottom.suptitle("Score maps: the probability that the window around a pixel holds the digit")
    probabilities = np.asarray(jax.nn.softmax(logits))
    edge = (WINDOW - 1) / 2 - 0.5
    middles = (edge, width - 1 - edge, height - 1 - edge, edge)
    for label, axes in enumerate(bottom.subplots(2, 5).flat):
        axes.imshow(page.ink, cmap="gray_r", vmax=5)
        score = probabilities[..., label]
        axes.imshow(score, cmap="Reds", alpha=score, extent=middles, vmin=-0.5, vmax=1.0)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_title(str(label), fontsize=10, pad=3)
    for axes in (*top.axes, *bottom.axes):
        axes.set(xticks=[], yticks=[])
    save_picture(figure, path)


def main(argv: list[str] | None = None) -> Result:
    """Trains, converts, compares, detects, draws; returns what it measured."""
    flags = parser(__doc__, "outputs/fully_convolutional.png")
    flags.add_argument("--epochs", type=positive, default=4, help="passes over all windows")
    flags.add_argument(
        "--page-size", type=int, nargs=2, default=[160, 240], metavar=("H", "W"), help="in pixels"
    )
    flags.add_argument("--digits", type=positive, default=150, help="test digits on the page")
    args = flags.parse_args(argv)
    data, val, test = digits(args.seed)
    if min(args.page_size) < WINDOW:
        flags.error(f"--page-size must be at least {WINDOW} {WINDOW}")
    limit = min(len(test.labels), max_digits(args.page_size))
    if args.digits > limit:
        flags.error(f"--digits must be at most {limit} on a page of this size")

    print(f"Training on pages of {len(data.labels)} digits", flush=True)
    params = init_classifier(jax.random.key(args.seed))
    options = {"pages": TRAINING_PAGES, "epochs": args.epochs, "seed": args.seed}
    params = train_on_pages(classify, params, data, val, **options)

    shown = jax.tree.map(lambda a: a[: args.digits], test)
    page = compose_page(np.random.default_rng(args.seed), shown, args.page_size)
    ways = {
        "as one convolution": partial(score_map, to_fully_convolutional(params)),
        "by fc.slide": partial(jax.jit(fc.slide(classify, (WINDOW, WINDOW))), params),
        "every window cut out": partial(score_windows, classify, params),
    }
    ink = jnp.asarray(page.ink)
    logits, slid, cut_out = (way(ink) for way in ways.values())
    for scores in (logits, slid):
        np.testing.assert_allclose(scores, cut_out, rtol=TOLERANCE, atol=TOLERANCE)
    found = detect(logits)
    right = match(found, page.digits)
    result = Result(
        test_accuracy=float(digit_accuracy(classify, params, test)),
        recall=float(right.any(0).mean()),
        precision=float(right.any(1).mean()) if len(found) else 0.0,
        max_difference=float(jnp.abs(logits - cut_out).max()),
    )

    count = f"{len(test.labels)} digits never seen in training"
    print(f"\nTest accuracy {result.test_accuracy:.1%} on {count}")
    rows, columns, _ = logits.shape
    print(f"Score map     {rows}×{columns} = {rows * columns:,} windows of the page")
    for name, way in ways.items():
        print(f"  {name:20} {median_seconds(partial(way, ink)) * 1e3:6.1f} ms")
    print(f"  largest difference   {result.max_difference:.1e} (tolerance {TOLERANCE:.0e})")
    print(f"Detections    recall {result.recall:.1%}, precision {result.precision:.1%}")
    plot(args.output, page, logits, found, right)
    return result


if __name__ == "__main__":
    main()
