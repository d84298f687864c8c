"""Find wrong labels by the gradients of single digits, and train with differential privacy.

Some of the 8×8 digits of scikit-learn get the label of another class, and a network is trained on
all of them. Two lists say which ones to look at first: by the norm of each digit's gradient, and by
its influence on the validation digits. Then a network is trained by clipped gradients with noise.
Run it with `python examples/which_digits_are_hard.py`; `--help` explains the flags.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Split, accuracy, digits, parser, positive, save_picture, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.optimize import brentq
from scipy.stats import norm
from tqdm import trange

import fclayers as fc

SIZES = [64, 128, 128, 10]
PRIVATE_SIZES = [64, 128, 10]  # noise is added to every weight, so there are fewer
MAX_NORM = 1.0
DELTA = 1e-4  # less than one over the number of digits


class Labels(NamedTuple):
    """The labels as they were, as they are now, and which of them changed."""

    true: np.ndarray
    given: np.ndarray
    swapped: np.ndarray


class Private(NamedTuple):
    """Test accuracy and the privacy spent, ε at `DELTA`, after every step."""

    accuracies: np.ndarray
    epsilons: np.ndarray


class Result(NamedTuple):
    """What the run measured; the shares are of the swapped digits, at every depth of the list."""

    labels: Labels
    found: dict[str, np.ndarray]
    test: float
    private: Private


def loss(params: Any, digit: Split) -> jax.Array:
    """Cross-entropy of one digit."""
    logits = fc.apply_mlp(params, digit.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, digit.labels)


def mean_loss(params: Any, batch: Split, key: jax.Array) -> jax.Array:
    """What training minimizes."""
    return jax.vmap(loss, in_axes=(None, 0))(params, batch).mean()


def swap(labels: jax.Array, count: int, seed: int) -> Labels:
    """Gives some digits the label of another class."""
    rng = np.random.default_rng(seed)
    true = np.asarray(labels)
    chosen = rng.choice(len(true), count, replace=False)
    given = true.copy()
    given[chosen] = (given[chosen] + rng.integers(1, 10, count)) % 10
    return Labels(true, given, given != true)


@jax.jit
def gradient_norms(params: Any, data: Split) -> jax.Array:
    """How far each digit alone would move the parameters."""
    return fc.per_example_norms(loss)(params, data)


@jax.jit
def harm(params: Any, data: Split, val: Split) -> jax.Array:
    """By how much a step on each digit raises the loss of the validation digits."""
    products = fc.gradient_gram(loss)(params, data, val)
    # Without the division, the few validation digits that the network gets wrong decide alone.
    return -(products / fc.per_example_norms(loss)(params, val)).mean(axis=1)


def share_found(order: np.ndarray, labels: Labels) -> np.ndarray:
    """The share of swapped digits among the first 1, 2, … of a list."""
    return np.cumsum(labels.swapped[order]) / labels.swapped.sum()


def train_privately(
    data: Split, test: Split, key: jax.Array, *, steps: int, noise_multiplier: float
) -> Private:
    """Trains by steps on all digits, whose clipped gradients are added up with noise."""
    optimizer = optax.sgd(0.2, momentum=0.9)

    @jax.jit
    def step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any]:
        private_grad = fc.clipped_grad(
            loss, MAX_NORM, reduction="mean", noise_multiplier=noise_multiplier, key=key
        )
        _, grads = private_grad(params, data)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    init_key, noise_key = jax.random.split(key)
    params = fc.init_mlp(init_key, PRIVATE_SIZES)
    opt_state = optimizer.init(params)
    accuracies = []
    for i in trange(steps, unit="step"):
        params, opt_state = step(params, opt_state, jax.random.fold_in(noise_key, i))
        accuracies.append(float(accuracy(params, test)))
    epsilons = [epsilon(i + 1, noise_multiplier) for i in range(steps)]
    return Private(np.array(accuracies), np.array(epsilons))


def epsilon(steps: int, noise_multiplier: float) -> float:
    """The privacy that steps on all digits spend, exactly.

    They reveal as much as one step with 1 / √steps of the noise, whose privacy is that of Balle &
    Wang 2018. Steps on random batches need an accountant, such as the package dp-accounting.
    """
    shift = steps**0.5 / noise_multiplier

    def excess(eps: float) -> float:
        tail = norm.logcdf(-shift / 2 - eps / shift)
        return norm.cdf(shift / 2 - eps / shift) - np.exp(eps + tail) - DELTA

    return brentq(excess, 0, shift**2 + 10 * shift) if excess(0) > 0 else 0.0


def plot(path: Path, data: Split, order: np.ndarray, guesses: np.ndarray, result: Result) -> None:
    """Draws the head of the list, what the lists find, and accuracy against privacy."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.75])
    labels = result.labels
    honest = order[~labels.swapped[order]]
    upper, lower = left.subfigures(2, 1, height_ratios=[4, 2.4])
    upper.suptitle("The largest gradients (swapped labels in red)")
    draw_digits(upper.subplots(4, 8), data, order, labels.given, "was", labels.true)
    lower.suptitle("The largest with the right label (mistakes in red)")
    draw_digits(lower.subplots(2, 8), data, honest, labels.true, "read", guesses)

    lists, privacy = right.subplots(1, 2)
    draw_lists(lists, result)
    draw_privacy(privacy, result)
    save_picture(figure, path)


def draw_digits(
    grid: np.ndarray,
    data: Split,
    order: np.ndarray,
    first: np.ndarray,
    verb: str,
    second: np.ndarray,
) -> None:
    """Draws the head of a list, with two labels where they differ."""
    for i, axes in zip(order, grid.flat, strict=False):
        axes.imshow(data.images[i].reshape(8, 8), cmap="gray_r")
        axes.set_axis_off()
        same = first[i] == second[i]
        text = f"{first[i]}" if same else f"{first[i]}, {verb} {second[i]}"
        axes.set_title(text, fontsize=8, pad=2, color="black" if same else "tab:red")


def draw_lists(axes: Axes, result: Result) -> None:
    """Draws the share of the swapped digits found against the length of the list."""
    total, swapped = len(result.labels.swapped), result.labels.swapped.sum()
    for name, found in result.found.items():
        axes.plot(np.arange(1, total + 1) / total, found, label=name, linewidth=2)
    axes.plot([0, swapped / total, 1], [0, 1, 1], color="gray", linestyle=":", label="perfect")
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, label="in random order")
    axes.set(xlim=(0, 0.3), ylim=(0, 1.03), title=f"{swapped} swapped labels among {total:,}")
    axes.set(xlabel="digits looked at", ylabel="swapped labels found")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def draw_privacy(axes: Axes, result: Result) -> None:
    """Draws the test accuracy against the privacy spent so far."""
    accuracies, epsilons = result.private
    axes.axhline(result.test, color="gray", linestyle=":", label="without privacy")
    axes.plot(epsilons, accuracies, color="tab:green", linewidth=2, label="one step after another")
    axes.plot(epsilons[-1], accuracies[-1], "o", color="tab:green")
    axes.set(xlim=(0, None), ylim=(0, 1), title="With differential privacy")
    axes.set(xlabel=f"privacy spent, ε at δ = {DELTA:g}", ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> Result:
    """Swaps, trains, makes the lists, trains privately, draws; returns what it measured."""
    flags = parser(__doc__, "outputs/which_digits_are_hard.png")
    flags.add_argument("--epochs", type=positive, default=60, help="passes over the digits")
    flags.add_argument("--swapped", type=positive, default=65, help="digits with a wrong label")
    flags.add_argument("--private-steps", type=positive, default=100, help="on all digits")
    flags.add_argument("--noise-multiplier", type=float, default=10.0, help="noise of a step")
    args = flags.parse_args(argv)
    if args.noise_multiplier <= 0:
        flags.error("--noise-multiplier must be positive")

    clean, val, test = digits(args.seed)
    if args.swapped > len(clean.labels):
        flags.error(f"--swapped must be at most {len(clean.labels)}")
    labels = swap(clean.labels, args.swapped, args.seed)
    data = Split(clean.images, jnp.asarray(labels.given))
    init_key, train_key, private_key = jax.random.split(jax.random.key(args.seed), 3)

    print(f"Training on {len(labels.given)} digits, {args.swapped} with a wrong label", flush=True)
    params, _ = train(
        fc.init_mlp(init_key, SIZES),
        data,
        train_key,
        epochs=args.epochs,
        batch_size=64,
        loss_fn=mean_loss,
    )
    scores = {
        "by gradient norm": gradient_norms(params, data),
        "by influence": harm(params, data, val),
    }
    orders = {name: np.argsort(-np.asarray(score)) for name, score in scores.items()}

    print("Training with differential privacy", flush=True)
    private = train_privately(
        data,
        test,
        private_key,
        steps=args.private_steps,
        noise_multiplier=args.noise_multiplier,
    )
    result = Result(
        labels,
        {name: share_found(order, labels) for name, order in orders.items()},
        float(accuracy(params, test)),
        private,
    )

    print(f"\nSwapped labels found, by the share of the {len(labels.given):,} digits looked at")
    depths = (0.05, 0.1, 0.2)
    print(f"{'':18}{''.join(f'{depth:8.0%}' for depth in depths)}")
    for name, found in result.found.items():
        shares = (found[int(depth * len(found)) - 1] for depth in depths)
        print(f"{name:18}{''.join(f'{share:8.1%}' for share in shares)}")
    print(f"\nTest accuracy     {result.test:.1%}")
    print(
        f"with privacy      {private.accuracies[-1]:.1%}, "
        f"ε = {private.epsilons[-1]:.2f} at δ = {DELTA:g}"
    )
    guesses = np.asarray(fc.apply_mlp(params, data.images).argmax(-1))
    plot(args.output, data, orders["by gradient norm"], guesses, result)
    return result


if __name__ == "__main__":
    main()
