"""What training measured, and the record that it is made from."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import numpy as np

from fclayers._util.errors import BadValue
from fclayers.train.state import Params
from fclayers.train.step import Run

EvalFn = Callable[[Params], Mapping[str, SupportsFloat]]


class History(NamedTuple):
    """What training measured."""

    steps: dict[str, np.ndarray]  # the loss and every metric of `loss_fn`, (steps,)
    epochs: dict[str, np.ndarray]  # their means as `train_...` and `eval_fn`'s values, (epochs,)
    steps_per_epoch: int

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws every metric over the epochs, by matplotlib, to a picture such as `loss.png`."""
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(k.removeprefix("train_") for k in [*self.steps, *self.epochs]))
        figure = Figure(figsize=(5.5 * len(names), 3.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            if name in self.steps:
                epochs = np.arange(1, len(self.steps[name]) + 1) / self.steps_per_epoch
                axes.plot(epochs, self.steps[name], "C0", alpha=0.3, linewidth=0.8, label="step")
            for key, style, label in (
                (f"train_{name}", "C0.-", "epoch"),
                (name, "C1.-", "evaluation"),
            ):
                if key in self.epochs:
                    values = self.epochs[key]
                    axes.plot(range(1, len(values) + 1), values, style, label=label)
            axes.set(xlabel="epoch", title=name)
            axes.grid(alpha=0.3)
            axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


class Record(NamedTuple):
    """A history that grows: pieces of steps, and values of epochs."""

    run: Run
    steps: dict[str, list[np.ndarray]]
    epochs: dict[str, list[float]]

    def history(self) -> History:
        """The history so far."""
        for pieces in self.steps.values():
            pieces[:] = [np.concatenate(pieces)]
        return History(
            {name: values for name, (values,) in self.steps.items()},
            {name: np.array(values) for name, values in self.epochs.items()},
            self.run.steps_per_epoch,
        )

    def add_steps(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Appends the metrics of further steps."""
        for name, values in metrics.items():
            self.steps.setdefault(name, []).append(values)

    def add_epoch(self, params: Params, eval_fn: EvalFn | None) -> dict[str, float]:
        """Appends the values of the epoch that has ended, and returns them."""
        steps_per_epoch = self.run.steps_per_epoch
        found: dict[str, SupportsFloat] = {}
        for name, values in self.history().steps.items():
            last = values[-steps_per_epoch:].astype(np.float64)
            sizes = np.full(len(last), self.run.batch_size)
            sizes[-1] = self.run.num_samples - self.run.samples_before(steps_per_epoch - 1)
            found[f"train_{name}"] = np.average(last, weights=sizes)
        if eval_fn is not None:
            found |= eval_fn(params)
        if self.epochs and set(self.epochs) != set(found):
            raise BadValue(
                f"expected eval_fn to return the same names after every epoch; they were "
                f"{sorted(self.epochs)}, and are {sorted(found)}"
            )
        newest = {name: float(value) for name, value in found.items()}
        for name, number in newest.items():
            self.epochs.setdefault(name, []).append(number)
        return newest


def record_from(history: History, run: Run) -> Record:
    """The record that resumes a history."""
    return Record(
        run,
        {name: [values] for name, values in history.steps.items()},
        {name: values.tolist() for name, values in history.epochs.items()},
    )
