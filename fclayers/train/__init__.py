"""Training: jitted by the step and by the epoch, and resumed to the last bit."""

from fclayers.train.epoch import epoch_order, make_epoch
from fclayers.train.fitting import fit
from fclayers.train.history import History
from fclayers.train.state import TrainState, init_state
from fclayers.train.step import make_step

__all__ = [
    "History",
    "TrainState",
    "epoch_order",
    "fit",
    "init_state",
    "make_epoch",
    "make_step",
]
