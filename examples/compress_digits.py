"""Shrink a trained network to a tenth of its bytes, at no loss that matters.

A wide MLP learns the 8×8 digits of scikit-learn. Then it is put into smaller forms: half
precision, 8-bit integers, low rank as it comes and trained on for a while, and a form of its own
for every layer. Validation digits choose one, test digits say what it is worth. Run it with
`python examples/compress_digits.py`; `--help` explains the flags.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax
from digits import Split, State, accuracy, load_splits, train_epoch
from tqdm import tqdm

import fclayers as fc

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

SIZES = [64, 512, 512, 10]
BATCH_SIZE = 64
BUDGET = 0.1
ENERGIES = [0.5, 0.9]
BLOCK_SIZE = 16
MAX_RANK = 16  # larger ones are over the budget


class Row(NamedTuple):
    """One form of the network: its bytes, its accuracies, ‖y' - y‖ / ‖y‖ of the logits."""

    form: str
    detail: str
    bytes: int
    validation: float
    test: float
    error: float


class Result(NamedTuple):
    """What the run measured; the first row is the network as trained."""

    rows: list[Row]
    chosen: Row


def train(params: Any, data: Split, key: jax.Array, epochs: int, what: str) -> Any:
    """Trains parameters of any form, with a progress bar."""
    schedule = optax.cosine_decay_schedule(2e-3, epochs * (len(data.labels) // BATCH_SIZE))
    optimizer = optax.adamw(schedule, weight_decay=1e-2)
    # train_epoch donates what it is given; a form shares its biases with the layers it came from.
    state = jax.tree.map(jnp.copy, State(params, jax.jit(optimizer.init)(params), key))
    for _ in tqdm(range(epochs), desc=what, unit="epoch"):
        state, _ = train_epoch(state, data, optimizer=optimizer, batch_size=BATCH_SIZE)
    return state.params


def smaller_forms(
    params: Any, data: Split, key: jax.Array, ranks: list[int], epochs: int
) -> Iterator[tuple[str, str, Any]]:
    """Yields name, detail and parameters of every form that is tried."""
    yield "bfloat16", "", jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    int8 = fc.quantize(params)
    yield "int8", "", int8
    yield f"int8, blocks of {BLOCK_SIZE}", "", fc.quantize(params, block_size=BLOCK_SIZE)
    for energy in ENERGIES:
        yield "low rank, energy", f"{energy:.0%}", fc.low_rank(params, energy=energy)

    for rank in ranks:
        # The last layer has ten outputs, which need about rank ten.
        narrow = fc.low_rank(params, rank=rank, where=lambda path: path != "2")
        yield "low rank", f"{rank}", narrow
        tuned = train(narrow, data, key, epochs, f"Tuning rank {rank}")
        yield "low rank, tuned", f"{rank}", tuned
        # Nine tenths of the weights are in the middle; the ends need only be smaller.
        yield "low rank amid int8", f"{rank}", (int8[0], narrow[1], int8[2])


@jax.jit
def scores(params: Any, expected: jax.Array, val: Split, test: Split) -> tuple[jax.Array, ...]:
    """Accuracy on both splits, and how far the validation logits are from the expected ones."""
    logits = fc.apply_mlp(params, val.images)
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    return (logits.argmax(-1) == val.labels).mean(), accuracy(params, test), error


def choose(rows: list[Row]) -> Row:
    """Picks, without a look at the test digits, a form within the budget."""
    trained = rows[0]
    small = [row for row in rows if row.bytes <= BUDGET * trained.bytes]
    # 144 digits cannot tell a form that is better than the network it came from; of those that
    # lose nothing, the one that changes the outputs least is the safest.
    return max(small, key=lambda row: (min(row.validation, trained.validation), -row.error))


def print_table(result: Result) -> None:
    """Prints a row for every form, an arrow before the chosen one."""
    print(f"\n  {'form':32} {'bytes':>9} {'ratio':>7} {'validation':>11} {'test':>7} {'error':>7}")
    for row in result.rows:
        print(
            f"{'→' if row is result.chosen else ' '} {row.form + ' ' + row.detail:32} "
            f"{row.bytes:9,} {row.bytes / result.rows[0].bytes:7.1%} {row.validation:11.1%} "
            f"{row.test:7.1%} {row.error:7.1%}"
        )


def plot(path: Path, result: Result) -> None:
    """Writes a picture: test accuracy against bytes, a colour for every kind of form."""
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    trained, chosen = result.rows[0], result.chosen
    budget = BUDGET * trained.bytes / 1024
    axes.axvline(budget, color="gray", linestyle="--", linewidth=1)
    note = {"rotation": 90, "ha": "right", "color": "gray"}
    bottom = axes.get_xaxis_transform()
    axes.text(budget, 0.02, f"{BUDGET:.0%} of the bytes ", transform=bottom, **note)
    axes.axhline(trained.test, color="gray", linestyle=":", linewidth=1)
    # Where the lines come together, the numbers of each are on a side of their own.
    sides = {"low rank": (9, -16), "low rank, tuned": (9, -8), "low rank amid int8": (-16, 8)}
    for i, form in enumerate(dict.fromkeys(row.form for row in result.rows)):
        rows = [row for row in result.rows if row.form == form]
        sizes = [row.bytes / 1024 for row in rows]
        color, line = f"C{i - 1}" if i else "black", "-" if form in sides else "none"
        tests = [row.test for row in rows]
        axes.plot(sizes, tests, marker="o", linestyle=line, color=color, label=form)
        for size, row in zip(sizes, rows, strict=True):
            side = {"xytext": sides.get(form, (8, -4)), "textcoords": "offset points"}
            axes.annotate(row.detail, (size, row.test), color=color, size=9, **side)
    ring = {"markersize": 14, "markerfacecolor": "none", "markeredgecolor": "black"}
    axes.plot(chosen.bytes / 1024, chosen.test, "o", label="chosen", **ring)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="size in KiB", ylabel="test accuracy", title="Digits in a tenth of the bytes")
    axes.legend(loc="lower right", title="numbers: rank, or energy kept")
    axes.grid(alpha=0.2)
    axes.margins(y=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Result:
    """Trains, shrinks, chooses, draws; returns what it measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training digits")
    parser.add_argument("--tuning-epochs", type=int, default=20, help="more for low rank forms")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], help="to try")
    parser.add_argument("--seed", type=int, default=0, help="of split, initial weights, shuffling")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/compress_digits.png"), help="of the picture"
    )
    args = parser.parse_args(argv)
    if min(args.epochs, args.tuning_epochs) < 1:
        parser.error("--epochs and --tuning-epochs must be at least 1")
    if not 1 <= min(args.ranks) <= max(args.ranks) <= MAX_RANK:
        parser.error(f"--ranks must be between 1 and {MAX_RANK}")

    data, val, test = load_splits(args.seed)
    init_key, train_key, tune_key = jax.random.split(jax.random.key(args.seed), 3)
    trained = train(fc.init_mlp(init_key, SIZES), data, train_key, args.epochs, "Training")
    forms = smaller_forms(trained, data, tune_key, sorted(args.ranks), args.tuning_epochs)
    expected, rows = fc.apply_mlp(trained, val.images), []
    for form, detail, params in [("as trained", "", trained), *forms]:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        rows.append(Row(form, detail, size, *map(float, scores(params, expected, val, test))))
    result = Result(rows, choose(rows))

    print_table(result)
    plot(args.output, result)
    before, after = rows[0], result.chosen
    print(f"\nChosen        {after.form} {after.detail}")
    print(f"Bytes         {before.bytes:,} to {after.bytes:,}, {after.bytes / before.bytes:.1%}")
    print(f"Test accuracy {before.test:.1%} to {after.test:.1%} on {len(test.labels)} digits")
    print(f"Picture       {args.output.resolve()}")
    return result


if __name__ == "__main__":
    main()
