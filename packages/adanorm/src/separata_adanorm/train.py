"""Training on parallel text."""

from pathlib import Path

import torch
from separata_shared.training import TrainConfig, TrainResult
from separata_shared.translation import fit_translation, load_for

from .config import DataConfig, DecodeConfig, ModelConfig
from .model import build_model


def train(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float = 0.1,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train a translation model with the norm of ``model``; a run that exists is continued.

    Args:
        model: Sizes, wiring and norms.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Kept with the run, for ``generate`` and ``evaluate``.
        label_smoothing: Share of the target probability spread over the vocabulary.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    corpus, model = load_for(model, data)
    groups = {"model": model, "data": data, "train": train, "decode": decode}
    torch.manual_seed(train.seed)
    network = build_model(model)
    return fit_translation(
        network, corpus, settings={**groups, "label_smoothing": label_smoothing}, run=run
    )
