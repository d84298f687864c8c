"""Teach a trained network new classes through adapters alone.

An MLP learns the digits 0 to 4 of scikit-learn's handwritten ones. Then its weights are frozen, and
low-rank adapters beside them learn 5 to 9. What that does to the first five is printed too. Run it
with `python examples/lora_digits.py`; `--help` explains the flags.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Split, accuracy, digits, parser, positive, train

import fclayers as fc

SIZES = [64, 256, 256, 10]
OLD, NEW = range(5), range(5, 10)
BATCH_SIZE = 32


class Accuracies(NamedTuple):
    """Shares of the old and the new test digits that are classified correctly."""

    old: float
    new: float


class Result(NamedTuple):
    """What the run measured, and the parameters that it started from and ended with."""

    before: Accuracies
    after: Accuracies
    without: Accuracies
    trained: int
    parameters: int
    difference: float
    pretrained: tuple[fc.LinearParams, ...]
    adapted: tuple[fc.LinearParams, ...]


def only(split: Split, labels: range) -> Split:
    """Keeps the digits with these labels."""
    kept = np.isin(split.labels, labels)
    return Split(split.images[kept], split.labels[kept])


def check_frozen(before: Any, after: Any) -> None:
    """Raises unless two trees hold the same bits."""
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), before, after
    )
    assert jax.tree.all(same), f"training the adapters changed the frozen weights: {same}"


def main(argv: list[str] | None = None) -> Result:
    """Trains, adapts, compares; returns what it measured."""
    flags = parser(__doc__)
    flags.add_argument("--epochs", type=positive, default=30, help="passes over the digits 0 to 4")
    flags.add_argument("--adapter-epochs", type=positive, default=30, help="passes over 5 to 9")
    flags.add_argument("--rank", type=positive, default=4, help="of the adapters, up to 10")
    flags.add_argument("--alpha", type=float, default=8, help="adapters count alpha / rank times")
    args = flags.parse_args(argv)
    if args.rank > SIZES[-1]:
        flags.error(f"--rank must be at most {SIZES[-1]}")

    data, _, test = digits(args.seed)
    keys = jax.random.split(jax.random.key(args.seed), 4)

    def accuracies(params: Any) -> Accuracies:
        return Accuracies(*(float(accuracy(params, only(test, part))) for part in (OLD, NEW)))

    print("Training on the digits 0 to 4", flush=True)
    params = fc.init_mlp(keys[0], SIZES)
    pretrained, _ = train(
        params,
        only(data, OLD),
        keys[1],
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        optimizer=optax.adam(1e-3),
    )

    print("Training adapters on the digits 5 to 9", flush=True)
    adapted = fc.add_lora(keys[2], pretrained, rank=args.rank, alpha=args.alpha)
    mask = fc.lora_mask(adapted)
    adapted, _ = train(
        adapted,
        only(data, NEW),
        keys[3],
        epochs=args.adapter_epochs,
        batch_size=BATCH_SIZE,
        optimizer=optax.partition({True: optax.adam(3e-3), False: optax.set_to_zero()}, mask),
    )
    bases = tuple(layer._replace(weight=layer.weight.base) for layer in adapted)
    check_frozen(pretrained, bases)

    logits = fc.apply_mlp(adapted, test.images)
    change = fc.apply_mlp(fc.materialize(adapted), test.images) - logits
    result = Result(
        before=accuracies(pretrained),
        after=accuracies(adapted),
        without=accuracies(bases),
        trained=sum(jax.tree.leaves(jax.tree.map(lambda a, m: a.size * m, adapted, mask))),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(adapted)),
        difference=float(jnp.abs(change).max() / jnp.abs(logits).max()),
        pretrained=pretrained,
        adapted=adapted,
    )

    print("\nTest accuracy  before   after   adapters removed")
    for i, which in enumerate(("0 to 4", "5 to 9")):
        columns = (result.before[i], result.after[i], result.without[i])
        print("digits {}  {:7.1%} {:7.1%} {:18.1%}".format(which, *columns))
    forgotten = result.before.old - result.after.old
    print(f"Forgotten      {forgotten * 100:.1f} points on 0 to 4, which the adapters never saw")
    print(f"Trained        {result.trained:,} of {result.parameters:,} parameters")
    print("Frozen         all others, the same bit for bit")
    print(f"Materialized   logits off by at most {result.difference:.0e} of the largest")
    return result


if __name__ == "__main__":
    main()
