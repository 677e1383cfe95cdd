"""Training on parallel text."""

from collections.abc import Callable
from pathlib import Path

import torch
from separata_shared.training import TrainConfig, TrainResult
from separata_shared.translation import DataConfig, DecodeConfig, fit_translation, load_for
from torch import nn

from .build import build_model
from .config import AttentionConfig, ModelConfig
from .model import set_top_k
from .selection import linear_top_k


def train(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float = 0.1,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train a translation model; a run directory that exists is continued.

    Args:
        model: Sizes, wiring and attention.
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
    settings = {"model": model, "data": data, "train": train, "decode": decode}
    torch.manual_seed(train.seed)
    transformer = build_model(model)
    return fit_translation(
        transformer,
        corpus,
        settings={**settings, "label_smoothing": label_smoothing},
        run=run,
        before_step=top_k_schedule(transformer, model.attention),
    )


def top_k_schedule(model: nn.Module, attention: AttentionConfig) -> Callable[[int], None] | None:
    """What to do before each update so that k follows its schedule; None without one."""
    if attention.start_top_k is None or not isinstance(attention.top_k, int):
        return None
    top_k = linear_top_k(attention.start_top_k, attention.top_k, attention.schedule_steps)
    return lambda step: set_top_k(model, top_k(step))
