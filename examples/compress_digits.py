"""Shrink a trained network to a tenth of its bytes, with no loss of accuracy.

A wide MLP learns the 8×8 digits of scikit-learn. Then its weights take smaller forms: half
precision, 8-bit integers, low rank before and after further training, and a form per layer.
Validation digits choose one, test digits measure it. Run it with
`python examples/compress_digits.py`; `--help` explains the flags.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from common import Split, accuracy, digits, parser, positive, save_picture, train
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

import fclayers as fc

SIZES = [64, 512, 512, 10]
BATCH_SIZE = 64
BUDGET = 0.1
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


def smaller_forms(
    params: Any, data: Split, key: jax.Array, ranks: list[int], epochs: int
) -> Iterator[tuple[str, str, Any]]:
    """Yields name, detail and parameters of every form that is tried."""
    yield "bfloat16", "", jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    int8 = fc.quantize(params)
    yield "int8", "", int8
    yield f"int8, blocks of {BLOCK_SIZE}", "", fc.quantize(params, block_size=BLOCK_SIZE)
    for energy in (0.5, 0.9):
        yield "low rank, energy", f"{energy:.0%}", fc.low_rank(params, energy=energy)
    for rank in ranks:
        # The last layer has ten outputs, which need about rank ten.
        narrow = fc.low_rank(params, rank=rank, select=lambda path: path != "2")
        yield "low rank", f"{rank}", narrow
        print(f"Tuning rank {rank}", flush=True)
        tuned, _ = train(narrow, data, key, epochs=epochs, batch_size=BATCH_SIZE)
        yield "low rank, tuned", f"{rank}", tuned
        # Nine tenths of the weights are in the middle layer; for the others int8 is enough.
        yield "low rank amid int8", f"{rank}", (int8[0], narrow[1], int8[2])


def choose(rows: list[Row]) -> Row:
    """Picks a form within the budget by the validation digits alone."""
    trained = rows[0]
    small = [row for row in rows if row.bytes <= BUDGET * trained.bytes]
    # 144 digits cannot tell whether a form is better than the network it came from; of those that
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
    """Draws test accuracy against bytes, with a color for every kind of form."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    trained, chosen = result.rows[0], result.chosen
    axes.axhline(trained.test, color="gray", linestyle=":", linewidth=1)
    budget = BUDGET * trained.bytes / 1024
    axes.axvline(budget, color="gray", linestyle="--", linewidth=1, label=f"{BUDGET:.0%} of bytes")
    # Where the lines meet, the numbers of each are on their own side.
    sides = {"low rank": (9, -16), "low rank, tuned": (9, -8), "low rank amid int8": (-16, 8)}
    for i, form in enumerate(dict.fromkeys(row.form for row in result.rows)):
        rows = [row for row in result.rows if row.form == form]
        places = [(row.bytes / 1024, row.test) for row in rows]
        color, line = f"C{i - 1}" if i else "black", "-" if form in sides else "none"
        axes.plot(*zip(*places, strict=True), "o", linestyle=line, color=color, label=form)
        for row, place in zip(rows, places, strict=True):
            side = {"xytext": sides.get(form, (8, -4)), "textcoords": "offset points"}
            axes.annotate(row.detail, place, color=color, size=9, **side)
    axes.plot(chosen.bytes / 1024, chosen.test, "ko", ms=14, mfc="none", label="chosen")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="size in KiB", ylabel="test accuracy", title="Digits in a tenth of the bytes")
    axes.legend(loc="lower right", title="numbers: rank, or energy kept")
    axes.grid(alpha=0.2)
    axes.margins(y=0.08)
    save_picture(figure, path)


def main(argv: list[str] | None = None) -> Result:
    """Trains, shrinks, chooses, draws; returns what it measured."""
    flags = parser(__doc__, "outputs/compress_digits.png")
    flags.add_argument("--epochs", type=positive, default=40, help="passes over the digits")
    flags.add_argument("--tuning-epochs", type=positive, default=20, help="more for low rank")
    flags.add_argument("--ranks", type=positive, nargs="+", default=[4, 8, 16], help="to try")
    args = flags.parse_args(argv)
    if max(args.ranks) > MAX_RANK:
        flags.error(f"--ranks must be at most {MAX_RANK}")

    data, val, test = digits(args.seed)
    init_key, train_key, tune_key = jax.random.split(jax.random.key(args.seed), 3)
    print("Training", flush=True)
    trained, _ = train(
        fc.init_mlp(init_key, SIZES), data, train_key, epochs=args.epochs, batch_size=BATCH_SIZE
    )
    forms = smaller_forms(trained, data, tune_key, sorted(args.ranks), args.tuning_epochs)
    expected, rows = fc.apply_mlp(trained, val.images), []
    for form, detail, params in [("as trained", "", trained), *forms]:
        change = jnp.linalg.norm(fc.apply_mlp(params, val.images) - expected)
        rows.append(
            Row(
                form,
                detail,
                bytes=fc.summarize(params).bytes,
                validation=float(accuracy(params, val)),
                test=float(accuracy(params, test)),
                error=float(change / jnp.linalg.norm(expected)),
            )
        )
    result = Result(rows, choose(rows))
    print_table(result)
    before, after = rows[0], result.chosen
    print(f"\nChosen        {after.form} {after.detail}")
    print(f"Bytes         {before.bytes:,} to {after.bytes:,}, {after.bytes / before.bytes:.1%}")
    print(f"Test accuracy {before.test:.1%} to {after.test:.1%} on {len(test.labels)} digits")
    plot(args.output, result)
    return result


if __name__ == "__main__":
    main()
