"""Train a multilayer perceptron on real handwritten digits.

The 1,797 images of 8×8 pixels that scikit-learn bundles, an MLP, an Adam loop that is jitted by
the epoch. Run it with `python examples/digits.py`; `--help` explains the flags.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fclayers as fc

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DROPOUT_RATE = 0.2


class Split(NamedTuple):
    """Images (N, 64) with values in [0, 1] and labels (N,) in 0..9."""

    images: jax.Array
    labels: jax.Array


class State(NamedTuple):
    """What training carries from step to step."""

    params: tuple[fc.LinearParams, ...]
    opt_state: optax.OptState
    key: jax.Array


def load_splits(seed: int) -> tuple[Split, Split, Split]:
    """Returns train (1,293), validation (144) and test (360) digits, every class in proportion."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    rest_x, test_x, rest_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=seed
    )
    train_x, val_x, train_y, val_y = train_test_split(
        rest_x, rest_y, test_size=144, stratify=rest_y, random_state=seed
    )
    return tuple(
        Split(jnp.asarray(x), jnp.asarray(y))
        for x, y in ((train_x, train_y), (val_x, val_y), (test_x, test_y))
    )


def loss_fn(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of one batch, with dropout."""
    logits = fc.apply_mlp(params, images, dropout_rate=DROPOUT_RATE, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames=("optimizer", "batch_size"), donate_argnames="state")
def train_epoch(
    state: State, train: Split, *, optimizer: optax.GradientTransformation, batch_size: int
) -> tuple[State, jax.Array]:
    """Runs one epoch of shuffled batches on the device; returns the new state and its losses."""

    def train_step(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        key, dropout_key = jax.random.split(state.key)
        loss, grads = jax.value_and_grad(loss_fn)(
            state.params, train.images[batch], train.labels[batch], dropout_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state, key), loss

    key, shuffle_key = jax.random.split(state.key)
    order = jax.random.permutation(shuffle_key, len(train.labels))
    num_batches = len(order) // batch_size
    batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)
    return jax.lax.scan(train_step, state._replace(key=key), batches)


@jax.jit
def accuracy(params: Any, split: Split) -> jax.Array:
    """Share of digits classified correctly."""
    return (fc.apply_mlp(params, split.images).argmax(-1) == split.labels).mean()


def plot(path: Path, losses: np.ndarray, params: Any, test: Split, test_accuracy: float) -> None:
    """Writes a picture: the loss, test digits with predictions, the first layer's weights."""
    figure = plt.figure(figsize=(15, 5.2), layout="constrained")
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
    mistakes = np.flatnonzero(predictions != labels)
    right_ones = np.flatnonzero(predictions == labels)
    shown = np.concatenate([mistakes, right_ones])[:48]
    middle.suptitle(f"Test digits, {test_accuracy:.1%} right (mistakes first, in red)")
    for i, axes in enumerate(middle.subplots(6, 8).flat):
        axes.set_axis_off()
        if i < len(shown):
            axes.imshow(test.images[shown[i]].reshape(8, 8), cmap="gray_r")
            wrong = predictions[shown[i]] != labels[shown[i]]
            text = f"{predictions[shown[i]]}" + (f", is {labels[shown[i]]}" if wrong else "")
            axes.set_title(text, fontsize=8, pad=2, color="tab:red" if wrong else "black")

    weight = np.asarray(params[0].weight)
    strongest = np.argsort(-np.linalg.norm(weight, axis=0))[:48]
    right.suptitle("First layer: what its units look for\n(red for ink, blue against)")
    limit = np.abs(weight).max()
    for i, axes in enumerate(right.subplots(6, 8).flat):
        axes.set_axis_off()
        if i < len(strongest):
            unit = weight[:, strongest[i]].reshape(8, 8)
            axes.imshow(unit, cmap="RdBu_r", vmin=-limit, vmax=limit)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> float:
    """Trains, evaluates, draws; returns the test accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=150, help="passes over the training digits")
    parser.add_argument("--batch-size", type=int, default=64, help="digits per step")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 256], help="hidden layers")
    parser.add_argument("--seed", type=int, default=0, help="of split, initial weights, shuffling")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/digits.png"), help="where the picture goes"
    )
    args = parser.parse_args(argv)

    train, val, test = load_splits(args.seed)
    if not 1 <= args.batch_size <= len(train.labels):
        parser.error(f"--batch-size must be between 1 and {len(train.labels)}")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    params = fc.init_mlp(init_key, [64, *args.sizes, 10])
    print("Model")
    fc.summarize(params)

    num_steps = args.epochs * (len(train.labels) // args.batch_size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, num_steps), weight_decay=1e-2)
    state = State(params, optimizer.init(params), train_key)
    losses = []
    print(f"\nTraining on {len(train.labels)} digits, validating on {len(val.labels)}")
    with tqdm(range(args.epochs), unit="epoch") as progress:
        for _ in progress:
            state, epoch_losses = train_epoch(
                state, train, optimizer=optimizer, batch_size=args.batch_size
            )
            losses.append(np.asarray(epoch_losses))
            progress.set_postfix(
                loss=f"{losses[-1].mean():.4f}",
                accuracy=f"{accuracy(state.params, val):.1%}",
                refresh=False,
            )

    test_accuracy = float(accuracy(state.params, test))
    plot(args.output, np.concatenate(losses), state.params, test, test_accuracy)
    print(
        f"\nTest accuracy {test_accuracy:.1%} on {len(test.labels)} digits never seen in training"
    )
    print(f"Picture       {args.output.resolve()}")
    return test_accuracy


if __name__ == "__main__":
    main()
