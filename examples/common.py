"""What the examples share: the flags, the digits of scikit-learn, training, and pictures."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fclayers as fc

matplotlib.use("Agg")

DROPOUT_RATE = 0.2


class Split(NamedTuple):
    """Images with values in [0, 1], (N, 64) for digits, and labels (N,)."""

    images: jax.Array
    labels: jax.Array


def parser(description: str | None, output: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with `--seed` and, with a default path for it, `--output`."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--seed", type=int, default=0, help="of split, initial weights, shuffling")
    if output is not None:
        flags.add_argument("--output", type=Path, default=Path(output), help="path of the picture")
    return flags


def positive(text: str) -> int:
    """The type of a flag that counts: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def digits(seed: int) -> tuple[Split, Split, Split]:
    """Returns train (1,293), validation (144) and test (360) digits, every class in proportion."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    rest_x, test_x, rest_y, test_y = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=seed
    )
    train_x, val_x, train_y, val_y = train_test_split(
        rest_x, rest_y, test_size=144, stratify=rest_y, random_state=seed
    )
    pairs = ((train_x, train_y), (val_x, val_y), (test_x, test_y))
    return tuple(Split(jnp.asarray(x), jnp.asarray(y)) for x, y in pairs)


def loss_fn(params: Any, batch: Split, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of an MLP on one batch, with dropout."""
    logits = fc.apply_mlp(params, batch.images, dropout_rate=DROPOUT_RATE, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@jax.jit
def accuracy(params: Any, split: Split) -> jax.Array:
    """Share of digits that an MLP classifies correctly."""
    return (fc.apply_mlp(params, split.images).argmax(-1) == split.labels).mean()


def train(
    params: Any,
    data: Split,
    key: jax.Array,
    *,
    epochs: int,
    batch_size: int,
    loss_fn: Any = loss_fn,
    learning_rate: float = 2e-3,
    optimizer: optax.GradientTransformation | None = None,
    **options: Any,
) -> tuple[Any, fc.train.History]:
    """Trains by `fc.train.fit`, by default with AdamW and a cosine schedule."""
    if optimizer is None:
        steps = epochs * -(-len(data.labels) // batch_size)
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        optimizer = optax.adamw(schedule, weight_decay=1e-2)
    state = fc.train.init_state(params, optimizer, key)
    state, history = fc.train.fit(
        state, data, loss_fn, optimizer, epochs=epochs, batch_size=batch_size, **options
    )
    return state.params, history


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a figure to a file, in a new folder if need be, and prints where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Picture       {path.resolve()}")
