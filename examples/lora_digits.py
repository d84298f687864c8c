"""Teach a trained network new classes through adapters alone.

An MLP learns the digits 0 to 4 of scikit-learn's handwritten ones. Then its weights are frozen, and
low-rank adapters beside them learn 5 to 9. What it does to the first five is printed as it is. Run
it with `python examples/lora_digits.py`; `--help` explains the flags.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Split, State, accuracy, load_splits, train_epoch
from tqdm import tqdm

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
    merged_difference: float
    pretrained: tuple[fc.LinearParams, ...]
    adapted: tuple[fc.LoraParams, ...]


def only(split: Split, labels: range) -> Split:
    """Keeps the digits with these labels."""
    kept = np.isin(split.labels, labels)
    return Split(split.images[kept], split.labels[kept])


def train(
    params: Any,
    data: Split,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    epochs: int,
    what: str,
) -> Any:
    """Trains what the optimizer lets train, with a progress bar."""
    # train_epoch donates what it is given, and the network before is needed after.
    state = jax.tree.map(jnp.copy, State(params, jax.jit(optimizer.init)(params), key))
    with tqdm(range(epochs), desc=what, unit="epoch") as progress:
        for _ in progress:
            state, losses = train_epoch(state, data, optimizer=optimizer, batch_size=BATCH_SIZE)
            progress.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)
    return state.params


def check_frozen(before: Any, after: Any) -> None:
    """Raises unless two trees hold the same bits."""
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), before, after
    )
    assert jax.tree.all(same), f"training the adapters changed the frozen weights: {same}"


def main(argv: list[str] | None = None) -> Result:
    """Trains, adapts, compares; returns what it measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the digits 0 to 4")
    parser.add_argument("--adapter-epochs", type=int, default=30, help="passes over 5 to 9")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters, up to 10")
    parser.add_argument("--alpha", type=float, default=8, help="adapters count alpha / rank times")
    parser.add_argument("--seed", type=int, default=0, help="of split, initial weights, shuffling")
    args = parser.parse_args(argv)
    if min(args.epochs, args.adapter_epochs) < 1:
        parser.error("--epochs and --adapter-epochs must be at least 1")
    if not 1 <= args.rank <= SIZES[-1]:
        parser.error(f"--rank must be between 1 and {SIZES[-1]}")

    data, _, test = load_splits(args.seed)
    keys = jax.random.split(jax.random.key(args.seed), 4)

    def accuracies(params: Any) -> Accuracies:
        return Accuracies(*(float(accuracy(params, only(test, part))) for part in (OLD, NEW)))

    params = fc.init_mlp(keys[0], SIZES)
    adam = optax.adam(1e-3)
    pretrained = train(params, only(data, OLD), adam, keys[1], args.epochs, "Digits 0 to 4")

    adapted = fc.add_lora(keys[2], pretrained, args.rank, args.alpha)
    mask = fc.lora_mask(adapted)
    optimizer = optax.partition({True: optax.adam(3e-3), False: optax.set_to_zero()}, mask)
    adapted = train(
        adapted, only(data, NEW), optimizer, keys[3], args.adapter_epochs, "Digits 5 to 9"
    )
    bases = tuple(layer.base for layer in adapted)
    check_frozen(pretrained, bases)

    logits = fc.apply_mlp(adapted, test.images)
    difference = fc.apply_mlp(fc.merge_lora(adapted), test.images) - logits
    result = Result(
        before=accuracies(pretrained),
        after=accuracies(adapted),
        without=accuracies(bases),
        trained=sum(jax.tree.leaves(jax.tree.map(lambda a, m: a.size * m, adapted, mask))),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(adapted)),
        merged_difference=float(jnp.abs(difference).max() / jnp.abs(logits).max()),
        pretrained=pretrained,
        adapted=adapted,
    )

    print("\nTest accuracy  before   after   adapters taken off")
    for i, digits in enumerate(("0 to 4", "5 to 9")):
        columns = (result.before[i], result.after[i], result.without[i])
        print("digits {}  {:7.1%} {:7.1%} {:20.1%}".format(digits, *columns))
    forgotten = result.before.old - result.after.old
    print(f"Forgotten      {forgotten * 100:.1f} points on 0 to 4, which the adapters never saw")
    print(f"Trained        {result.trained:,} of {result.parameters:,} parameters")
    print("Frozen         all others, the same bit for bit")
    print(f"Merged         logits off by at most {result.merged_difference:.0e} of the largest")
    return result


if __name__ == "__main__":
    main()
