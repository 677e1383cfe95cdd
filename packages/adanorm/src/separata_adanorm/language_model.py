"""Training and scoring of the language model of characters: ``train-lm`` and ``evaluate-lm``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from separata_shared.language_model import (
    Memory,
    as_characters,
    language_model_loss,
    language_model_sums,
    next_symbol_loss,
    reading_blocks,
    training_blocks,
)
from separata_shared.metrics import bits_per_character
from separata_shared.training import Run, TrainConfig, TrainResult, distributed, fit
from separata_shared.translation import load_characters

from .build import NormKind, check_norm, norm_factory
from .config import DataConfig
from .recurrent import RecurrentTransformer, build_recurrent_transformer
from .runs import load_best, run_config, write_scores


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes and norms of the language model, and how it reads."""

    width: int = 512
    """Model width M."""

    hidden_width: int = 2048
    """Inner width of the feed-forward layers."""

    num_heads: int = 8
    """Attention heads H."""

    num_layers: int = 12
    """Number of layers."""

    dropout: float = 0.1
    """Dropout after each sub-layer, in the feed-forward layers and on the embeddings."""

    normalisation: Literal["post", "pre"] = "pre"
    """The norm after the residual sum, or before the sub-layer."""

    norm: NormKind = "ada_norm"
    """Which norm, in every place of one."""

    C: float = 1.0
    """Mean of the scaling of ``ada_norm``."""

    memory: int = 512
    """Characters L before a block that each layer remembers."""

    streams: int = 22
    """Parallel streams B of the training text."""

    block: int = 512
    """Characters T that a stream advances in one step."""

    valid_characters: int = 0
    """Characters of the validation part that are read during training; 0 reads all."""

    vocabulary_size: int = 0
    """Symbols V; 0 takes the number from the data."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        sizes = ("width", "hidden_width", "num_heads", "num_layers", "memory", "streams", "block")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"language_model.{name}: must be at least 1, got {getattr(self, name)}"
                )
        if self.width % self.num_heads:
            raise ValueError(
                f"language_model.num_heads: {self.num_heads} heads do not divide width {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"language_model.dropout: must be in [0, 1), got {self.dropout}")
        check_norm("language_model", C=self.C, width=self.width)
        if self.valid_characters < 0:
            raise ValueError("language_model.valid_characters: must not be negative")


def build_language_model(config: LanguageModelConfig) -> RecurrentTransformer:
    """Compose the model that ``config`` describes, with fresh parameters."""
    return build_recurrent_transformer(
        config.vocabulary_size,
        width=config.width,
        hidden_width=config.hidden_width,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        dropout=config.dropout,
        memory=config.memory,
        normalisation=config.normalisation,
        norm=norm_factory(config.norm, C=config.C),
    )


def train_lm(
    *,
    language_model: LanguageModelConfig,
    data: DataConfig,
    train: TrainConfig,
    run: Path = Path("runs/tiny-lm"),
) -> TrainResult:
    """Train the language model of characters; a run directory that exists is continued.

    Args:
        language_model: Sizes, norms and reading.
        data: Which text.
        train: Optimizer, schedule, length of training, checkpoints.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    if train.accumulate != 1 or distributed.start(train.device).size != 1:
        raise ValueError(
            "train.accumulate: the language model reads all its streams in every step; it is "
            "trained by one process without accumulation"
        )
    data = as_characters(data)
    text = load_characters(data)
    if language_model.vocabulary_size not in (0, text.vocabulary_size):
        raise ValueError(
            f"language_model.vocabulary_size: is {language_model.vocabulary_size}, but the text "
            f"has {text.vocabulary_size} symbols"
        )
    config = replace(language_model, vocabulary_size=text.vocabulary_size)
    torch.manual_seed(train.seed)
    model = build_language_model(config)
    memory = Memory((config.num_layers, config.streams, config.memory, config.width))
    model.add_module("memory", memory)
    valid = text.valid[: config.valid_characters or None]
    return fit(
        model,
        training_blocks(text.train, streams=config.streams, block=config.block, seed=train.seed),
        lambda network, block: next_symbol_loss(network, model, memory, block),
        config=train,
        run=Run(run, {"language_model": config, "data": data, "train": train}),
        evaluate=lambda _: language_model_loss(
            model, reading_blocks(valid, config.streams, config.block)
        ),
    )


def evaluate_lm(
    *,
    run: Path = Path("runs/tiny-lm"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
    characters: int | None = None,
) -> dict[str, Any]:
    """Score a trained language model in bits per character.

    Args:
        run: Run directory of ``train-lm``.
        split: Part of the text.
        weights: Weights file; default: the best of the run.
        characters: Score only so many at the beginning of the part; default: all.

    Returns:
        What was written: ``scores.json`` in the run directory for the test part,
        ``scores.valid.json`` for the other.

    Raises:
        ValueError: The run or its data cannot be read, or there is nothing to score.
    """
    if characters is not None and characters < 1:
        raise ValueError(f"characters: must be at least 1, got {characters}")
    config: LanguageModelConfig = run_config(run, "language_model", LanguageModelConfig)
    text = load_characters(run_config(run, "data", DataConfig))
    if text.vocabulary_size != config.vocabulary_size:
        raise ValueError(f"{run}: was trained on another text; prepare the data as it was then")
    model = build_language_model(config)
    path = load_best(model, run, weights)
    blocks = reading_blocks(getattr(text, split)[:characters], config.streams, config.block)
    score = bits_per_character(language_model_sums(model, blocks))
    return write_scores(run, split, path, {"bits_per_character": score})
