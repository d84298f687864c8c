"""Train a multilayer perceptron on real handwritten digits.

The 1,797 images of 8×8 pixels that scikit-learn bundles, an MLP, and `fc.train.fit`. Run it with
`python examples/digits.py`; `--help` explains the flags.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Split, accuracy, digits, parser, positive, save_picture, train
from matplotlib.figure import Figure

import fclayers as fc


def plot(path: Path, losses: np.ndarray, params: Any, test: Split) -> None:
    """Draws the loss, test digits with predictions, and the first layer's weights."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)

    axes = left.subplots()
    axes.semilogy(losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.semilogy(np.arange(len(smooth)) + window / 2, smooth, color="tab:blue")
    axes.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    axes.grid(alpha=0.3)

    predictions = np.asarray(fc.apply_mlp(params, test.images).argmax(-1))
    labels = np.asarray(test.labels)
    correct = predictions == labels
    middle.suptitle(f"Test digits, {correct.mean():.1%} correct (mistakes first, in red)")
    for i, axes in zip(np.argsort(correct, kind="stable"), grid(middle), strict=False):
        axes.imshow(test.images[i].reshape(8, 8), cmap="gray_r")
        text = f"{predictions[i]}" if correct[i] else f"{predictions[i]}, is {labels[i]}"
        axes.set_title(text, fontsize=8, pad=2, color="black" if correct[i] else "tab:red")

    weight = np.asarray(params[0].weight)
    strongest = np.argsort(-np.linalg.norm(weight, axis=0))
    limit = np.abs(weight).max()
    right.suptitle("First layer: the weights of its strongest units\n(red positive, blue negative)")
    for unit, axes in zip(strongest, grid(right), strict=False):
        image = weight[:, unit].reshape(8, 8)
        axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
    save_picture(figure, path)


def grid(figure: Figure) -> list[Any]:
    """Makes 6×8 axes without a frame."""
    axes = list(figure.subplots(6, 8).flat)
    for one in axes:
        one.set_axis_off()
    return axes


def main(argv: list[str] | None = None) -> float:
    """Trains, evaluates, draws; returns the test accuracy."""
    flags = parser(__doc__, "outputs/digits.png")
    flags.add_argument("--epochs", type=positive, default=150, help="passes over the digits")
    flags.add_argument("--batch-size", type=positive, default=64, help="digits per step")
    flags.add_argument("--sizes", type=positive, nargs="+", default=[256, 256], help="of layers")
    args = flags.parse_args(argv)

    data, val, test = digits(args.seed)
    if args.batch_size > len(data.labels):
        flags.error(f"--batch-size must be at most {len(data.labels)}")
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    params = fc.init_mlp(init_key, [64, *args.sizes, 10])
    print(fc.summarize(params))

    print(f"\nTraining on {len(data.labels)} digits, validating on {len(val.labels)}", flush=True)
    params, history = train(
        params,
        data,
        train_key,
        epochs=args.epochs,
        batch_size=args.batch_size,
        eval_fn=lambda params: {"accuracy": accuracy(params, val)},
    )
    test_accuracy = float(accuracy(params, test))
    count = f"{len(test.labels)} digits never seen in training"
    print(f"\nTest accuracy {test_accuracy:.1%} on {count}")
    plot(args.output, history.steps["loss"], params, test)
    return test_accuracy


if __name__ == "__main__":
    main()
