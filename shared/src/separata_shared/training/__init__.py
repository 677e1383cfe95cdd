"""The training loop and what it needs: schedules, processes, checkpoints, run directories."""

from separata_shared.training.config import Loss, TrainConfig, TrainResult
from separata_shared.training.loop import fit
from separata_shared.training.run import Run
from separata_shared.training.signals import Interrupted
from separata_shared.training.weights import (
    average_weights,
    load_weights,
    read_weights,
    save_weights,
)

__all__ = [
    "Interrupted",
    "Loss",
    "Run",
    "TrainConfig",
    "TrainResult",
    "average_weights",
    "fit",
    "load_weights",
    "read_weights",
    "save_weights",
]
