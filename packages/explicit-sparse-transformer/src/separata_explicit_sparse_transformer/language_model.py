"""Training and scoring of the character language model: the verbs ``train-lm``, ``evaluate-lm``.

A text is cut into parallel streams that are read block by block; each stream's past is kept in
caches from one block to the next.

Shapes: B streams, T positions of a block, L maximal span, M model width.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from separata_shared.cli import from_yaml
from separata_shared.files import write_json
from separata_shared.language_model import (
    Block,
    Memory,
    as_characters,
    language_model_loss,
    language_model_sums,
    next_symbol_loss,
    reading_blocks,
    training_blocks,
)
from separata_shared.metrics import bits_per_character
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, distributed, fit
from separata_shared.training.optim import clip_each_norm
from separata_shared.training.weights import load_weights
from separata_shared.translation.scoring import SCORES
from torch import nn

from .data import DataConfig, load_characters
from .span import AdaptiveSpan, SpanLanguageModel, build_span_language_model


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes of the adaptive-span language model, and how it reads."""

    width: int = 512
    """Model width M."""

    hidden_width: int = 2048
    """Inner width of the feed-forward layers."""

    num_heads: int = 8
    """Attention heads, each with a span of its own."""

    num_layers: int = 12
    """Number of layers."""

    dropout: float = 0.3
    """Dropout on attention weights and feed-forward activations."""

    max_span: int = 8192
    """Longest span L in characters."""

    ramp: int = 32
    """Length of the soft edge of a span."""

    initial_span: float = 0.0
    """Share of ``max_span`` that the spans begin with."""

    span_loss: float = 5e-7
    """Weight of the mean span of each layer in the loss, per character."""

    top_k: int | None = None
    """Keys kept per query; null keeps all within the span."""

    streams: int = 64
    """Parallel streams B of the training text."""

    block: int = 512
    """Characters T that a stream advances in one step."""

    valid_characters: int = 0
    """Characters of the validation part that are read during training; 0 reads all."""

    micro_batches: int = 1
    """Parts that the streams of a step are read in: ``train.accumulate`` times the processes."""

    vocabulary_size: int = 0
    """Symbols; 0 takes the number from the data."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        names = ("width", "hidden_width", "num_heads", "num_layers", "max_span", "ramp")
        for name in (*names, "streams", "block", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"language_model.{name}: must be at least 1, got {getattr(self, name)}"
                )
        if self.valid_characters < 0:
            raise ValueError(
                "language_model.valid_characters: must not be negative, got "
                f"{self.valid_characters}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"language_model.top_k: must be at least 1, got {self.top_k}")
        if self.width % self.num_heads:
            raise ValueError(
                f"language_model.num_heads: {self.num_heads} heads do not divide width {self.width}"
            )
        if self.streams % self.micro_batches:
            raise ValueError(
                f"language_model.micro_batches: {self.micro_batches} does not divide "
                f"{self.streams} streams"
            )
        for name in ("dropout", "initial_span"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"language_model.{name}: must be in [0, 1], got {getattr(self, name)}"
                )


def train_lm(
    *,
    language_model: LanguageModelConfig,
    data: DataConfig,
    train: TrainConfig,
    run: Path = Path("runs/tiny-lm"),
) -> TrainResult:
    """Train a character language model; a run directory that exists is continued.

    ``train.clip_norm`` bounds the gradient of each parameter on its own.

    Args:
        language_model: Sizes and reading.
        data: Which text.
        train: Optimizer, schedule, length of training, checkpoints.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    data = as_characters(data)
    characters = load_characters(data)
    if language_model.vocabulary_size not in (0, characters.vocabulary_size):
        raise ValueError(
            f"language_model.vocabulary_size: is {language_model.vocabulary_size}, but the data "
            f"has {characters.vocabulary_size} symbols"
        )
    config = replace(language_model, vocabulary_size=characters.vocabulary_size)
    check_processes(config, train, distributed.start(train.device).size)
    torch.manual_seed(train.seed)
    model = build_language_model(config)
    memory = memory_of(config)
    model.add_module("memory", memory)

    def evaluate(network: nn.Module) -> dict[str, float]:
        # Called after an update and before the spans are brought back to their range.
        model.clamp_spans()
        symbols = characters.valid[: config.valid_characters or None]
        blocks = reading_blocks(symbols, config.streams, config.block)
        return {**language_model_loss(model, blocks), **span_statistics(model)}

    return fit(
        model,
        training_blocks(
            characters.train,
            streams=config.streams,
            block=config.block,
            parts=config.micro_batches,
            seed=train.seed,
        ),
        language_model_step(model, memory, config.span_loss),
        config=train,
        run=Run(run, {"language_model": config, "data": data, "train": train}),
        evaluate=evaluate,
        before_step=lambda step: model.clamp_spans(),
        clip=partial(clip_each_norm, max_norm=train.clip_norm or math.inf),
    )


def check_processes(config: LanguageModelConfig, train: TrainConfig, processes: int) -> None:
    """Check that every micro-batch of a step meets the streams it remembers.

    Raises:
        ValueError: The number of micro-batches of a step is another one, or the model is sharded.
    """
    if train.accumulate * processes != config.micro_batches:
        raise ValueError(
            f"language_model.micro_batches: is {config.micro_batches}, but train.accumulate "
            f"{train.accumulate} times {processes} processes are {train.accumulate * processes}"
        )
    if processes > 1 and train.parallel != "ddp":
        raise ValueError("train.parallel: the language model is trained with ddp only")


def build_language_model(config: LanguageModelConfig) -> SpanLanguageModel:
    """Compose the model that ``config`` describes, with fresh parameters."""
    return build_span_language_model(
        config.vocabulary_size,
        width=config.width,
        hidden_width=config.hidden_width,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        dropout=config.dropout,
        span=lambda: AdaptiveSpan(
            config.max_span,
            num_heads=config.num_heads,
            ramp=config.ramp,
            initial=config.initial_span,
            top_k=lambda num_keys: config.top_k,
        ),
    )


def memory_of(config: LanguageModelConfig) -> Memory:
    """An empty memory for the streams and caches of ``config``."""
    parts = config.micro_batches
    shape = (config.num_layers, config.streams // parts, config.max_span, config.width)
    return Memory(shape, parts=parts)


def language_model_step(
    model: SpanLanguageModel, memory: Memory, span_loss: float
) -> Callable[[nn.Module, Block], Loss]:
    """Cross-entropy summed over the characters of a block, plus the span loss of each.

    Args:
        model: The model, for its spans.
        memory: Takes the caches from block to block.
        span_loss: Weight of the span loss.
    """

    def step(network: nn.Module, batch: Block) -> Loss:
        loss = next_symbol_loss(network, model, memory, batch)
        spans = model.span_loss()
        log = {**loss.log, "span": spans.detach() / len(model.spans) * loss.count}
        return replace(loss, total=loss.total + loss.count * span_loss * spans, log=log)

    return step


def span_statistics(model: SpanLanguageModel) -> dict[str, float]:
    """Mean over the layers of the average span, and the longest span, in characters."""
    averages = [span.average() for span in model.spans]
    longest = max(span.longest() for span in model.spans)
    return {"average_span": sum(averages) / len(averages), "longest_span": float(longest)}


def evaluate_lm(
    *,
    run: Path = Path("runs/tiny-lm"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
    streams: int | None = None,
    characters: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Score a trained language model in bits per character.

    Args:
        run: Run directory of ``train-lm``.
        split: Part of the text.
        weights: Weights file; default: the best of the run.
        streams: Streams that the text is cut into; each begins without a past. Default: the run's.
        characters: Score only so many at the beginning of the part; default: all.
        output: File for the scores; default: ``scores.json`` in the run directory for the test
            part, ``scores.valid.json`` for the other.

    Returns:
        What was written to the file.

    Raises:
        ValueError: The run or its data cannot be read, or there is nothing to score.
    """
    for name, number in (("streams", streams), ("characters", characters)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: must be at least 1, got {number}")
    directory = Run(run)
    if not directory.config.exists():
        raise ValueError(f"{run}: not a run directory; train one first")
    groups = from_yaml(
        directory.config, {"language_model": LanguageModelConfig, "data": DataConfig}
    )
    config = groups["language_model"]
    text = load_characters(groups["data"])
    if text.vocabulary_size != config.vocabulary_size:
        raise ValueError(
            f"{run}: the model has {config.vocabulary_size} symbols, the data "
            f"{text.vocabulary_size}; prepare the data as for the training"
        )
    path = weights or directory.best_weights()
    model = build_language_model(config)
    load_weights(model, path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.clamp_spans()
    symbols = getattr(text, split)[:characters]
    began = time.perf_counter()
    score = bits_per_character(
        language_model_sums(model, reading_blocks(symbols, streams or config.streams, config.block))
    )
    scores = {
        "split": split,
        "weights": path.name,
        "seconds": round(time.perf_counter() - began, 2),
        "metrics": {"bits_per_character": score.as_dict()},
        "spans": span_statistics(model),
    }
    path = output or run / SCORES[split]
    write_json(path, scores)
    print(f"{score.value:.4f} {score.unit} ({score.signature}, n = {score.n})")
    print(path)
    return scores
