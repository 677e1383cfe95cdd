"""Training and scoring of the character language model: the verbs ``train-lm``, ``evaluate-lm``.

A text is cut into parallel streams that are read block by block; each stream's past is kept in
caches from one block to the next.

Shapes: B streams, T positions of a block, L maximal span, M model width.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.cli import from_yaml
from separata_shared.data.batching import Batches
from separata_shared.files import write_json
from separata_shared.metrics import bits_per_character
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, distributed, fit
from separata_shared.training.optim import clip_each_norm
from separata_shared.training.weights import load_weights
from separata_shared.translation.scoring import SCORES
from torch import Tensor, nn
from torch.nn import functional as F

from .data import DataConfig, load_characters
from .span import AdaptiveSpan, SpanLanguageModel, build_span_language_model

Symbols = NDArray[np.integer[Any]]


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


class Block(NamedTuple):
    """One block of some of the streams."""

    tokens: Tensor
    """Symbols (B,T)."""
    targets: Tensor
    """The symbol after each of them (B,T)."""
    part: int
    """Which of the micro-batches the streams belong to."""
    is_first: bool
    """Whether the streams begin with this block."""


class Blocks(Sequence[Block]):
    """The blocks of a text, all streams advancing together.

    Args:
        symbols: The text (N,).
        streams: Number of streams the text is cut into.
        block: Characters of a block.
        parts: Micro-batches that the streams of one step are dealt to, in order.
        offset: Characters left out at the beginning.

    Raises:
        ValueError: The text is too short for one block.
    """

    def __init__(
        self, symbols: Symbols, *, streams: int, block: int, parts: int = 1, offset: int = 0
    ) -> None:
        length = (len(symbols) - offset) // streams
        self._block, self._parts = block, parts
        self._steps = (length - 1) // block
        if self._steps < 1:
            raise ValueError(
                f"a text of {len(symbols)} characters is too short for {streams} streams of blocks "
                f"of {block}"
            )
        self._rows = symbols[offset : offset + streams * length].reshape(streams, length)

    def __len__(self) -> int:
        return self._steps * self._parts

    def __getitem__(self, index: Any) -> Any:
        step, part = divmod(index, self._parts)
        size = len(self._rows) // self._parts
        columns = slice(step * self._block, (step + 1) * self._block + 1)
        chosen = self._rows[part * size : (part + 1) * size, columns].astype(np.int64)
        block = torch.from_numpy(chosen)
        return Block(block[:, :-1], block[:, 1:], part, step == 0)


class Memory(nn.Module):
    """What a language model remembers of the streams it is being trained on.

    As a submodule of the model it is saved in checkpoints, so a run of one process goes on exactly
    where it was. With several, those that did not save begin with an empty past. Weight files,
    which hold parameters and buffers alone, do not contain it.

    Args:
        config: Sizes of model and streams.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        streams = config.streams // config.micro_batches
        self._shape = (config.num_layers, streams, config.max_span, config.width)
        self._caches: list[list[Tensor] | None] = [None] * config.micro_batches

    def recall(self, part: int) -> list[Tensor] | None:
        """Caches of the layers after the last block of ``part``; None before the first."""
        return self._caches[part]

    def keep(self, part: int, caches: list[Tensor]) -> None:
        """Replace the caches of ``part``."""
        self._caches[part] = caches

    def get_extra_state(self) -> Tensor:
        """All caches, filled up with zeros to their longest: ``(parts, layers, B, L, M)``."""
        state = torch.zeros(len(self._caches), *self._shape)
        for part, caches in enumerate(self._caches):
            for layer, cache in enumerate(caches or []):
                state[part, layer, :, self._shape[2] - cache.shape[1] :] = cache
        return state

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what ``get_extra_state`` gave."""
        self._caches = [list(part.unbind()) for part in state]


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
    memory = Memory(config)
    model.add_module("memory", memory)

    def evaluate(network: nn.Module) -> dict[str, float]:
        # Called after an update and before the spans are brought back to their range.
        model.clamp_spans()
        symbols = characters.valid[: config.valid_characters or None]
        blocks = reading_blocks(symbols, config.streams, config.block)
        return {**language_model_loss(model, blocks), **span_statistics(model)}

    return fit(
        model,
        training_blocks(characters.train, config, seed=train.seed),
        language_model_step(model, memory, config.span_loss),
        config=train,
        run=Run(run, {"language_model": config, "data": data, "train": train}),
        evaluate=evaluate,
        before_step=lambda step: model.clamp_spans(),
        clip=partial(clip_each_norm, max_norm=train.clip_norm or math.inf),
    )


def as_characters(data: DataConfig) -> DataConfig:
    """The made text in the place of the made sentence pairs of the default configuration."""
    return replace(data, dataset="tiny_characters") if data.dataset == "tiny" else data


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


def training_blocks(symbols: Symbols, config: LanguageModelConfig, *, seed: int) -> Batches[Block]:
    """Blocks of each epoch; every epoch cuts the text at other places, drawn from the seed."""

    def epoch_blocks(epoch: int) -> Blocks:
        offset = int(np.random.default_rng((seed, epoch)).integers(config.block))
        return Blocks(
            symbols,
            streams=config.streams,
            block=config.block,
            parts=config.micro_batches,
            offset=offset if epoch else 0,
        )

    return epoch_blocks


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
        caches = None if batch.is_first else memory.recall(batch.part)
        caches = model.start(len(batch.tokens)) if caches is None else caches
        logits, kept = network(batch.tokens, [cache.to(batch.tokens.device) for cache in caches])
        memory.keep(batch.part, kept)
        count = torch.tensor(batch.targets.numel(), device=logits.device)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
        spans = model.span_loss()
        log = {"nll": nll.detach(), "span": spans.detach() / len(model.spans) * count}
        return Loss(total=nll + count * span_loss * spans, count=count, log=log)

    return step


def reading_blocks(symbols: Symbols, streams: int, block: int) -> Iterator[Block]:
    """Blocks for scoring: streams as even as can be, and no character after the first left out.

    Raises:
        ValueError: There is no character to predict.
    """
    if len(symbols) < 2:
        raise ValueError(f"a text of {len(symbols)} characters has none to predict")
    length = math.ceil((len(symbols) - 1) / streams)
    starts = range(0, len(symbols) - 1, length)
    rows = [symbols[start : start + length + 1].astype(np.int64) for start in starts]
    for begin in range(0, length, block):
        parts = [torch.from_numpy(row[begin : begin + block + 1]) for row in rows]
        # Only the last stream can be shorter than the others; its missing targets do not count.
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=_NO_TARGET)
        yield Block(padded[:, :-1].clamp(min=0), padded[:, 1:], 0, begin == 0)


_NO_TARGET = -100


@torch.no_grad()
def language_model_sums(
    model: SpanLanguageModel, blocks: Iterable[Block]
) -> Iterator[tuple[float, int]]:
    """Summed negative log-likelihood in nats and number of characters of each block."""
    device = model.key_positions.device
    caches: list[Tensor] = []
    for batch in blocks:
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        if batch.is_first:
            caches = model.start(len(tokens))
        logits, caches = model(tokens, caches)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=_NO_TARGET,
            reduction="sum",
        )
        yield nll.item(), int((targets != _NO_TARGET).sum())


def language_model_loss(model: SpanLanguageModel, blocks: Iterable[Block]) -> dict[str, float]:
    """Negative log-likelihood in nats, and bits, per character."""
    bits = bits_per_character(language_model_sums(model, blocks)).value
    return {"loss": bits * math.log(2), "bits_per_character": bits}


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
