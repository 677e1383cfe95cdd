"""Sentence classification: RT and SST-5 in their public formats, made sentences; and the encoder.

Shapes: N sentences, B sentences of a batch, S tokens, M model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from separata_shared.data import Batches, MappedSequence, TokenBuckets, pad
from separata_shared.data.vocabulary import PAD, Vocabulary, frequent_words
from separata_shared.files import read_lines
from separata_shared.nn import (
    Encoder,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    PreNorm,
    SinusoidalPositions,
    TokenEmbedding,
    padding_mask,
)
from torch import Tensor, nn

from .build import NormKind, check_norm, norm_factory
from .runs import need_file

_RT_SPLIT = (8608, 964, 1089)


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """Which sentences, and the Transformer encoder that reads them."""

    dataset: Literal["tiny", "rt", "sst5"] = "tiny"
    """``tiny`` is made; ``rt`` are the movie reviews of Pang and Lee (2005)."""

    raw: str = "data/sentence-classification"
    """Directory of the files, compressed or not."""

    split_seed: int = 1
    """Seed of the split of ``rt``, which has none of its own."""

    tiny_sentences: int = 2000
    """Training sentences of the data set tiny."""

    vocabulary_size: int = 10000
    """Most frequent words that are known, special tokens included."""

    max_tokens: int = 4096
    """Padded tokens of a batch."""

    width: int = 128
    """Model width M, also of the embeddings."""

    num_heads: int = 4
    """Attention heads."""

    hidden_width: int = 512
    """Inner width of the feed-forward layers."""

    num_layers: int = 4
    """Encoder layers."""

    dropout: float = 0.2
    """Dropout on the embeddings, after each sub-layer and before the output layer."""

    norm: NormKind = "ada_norm"
    """Every norm of the encoder."""

    C: float = 1.0
    """Factor C of AdaNorm."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        names = ("tiny_sentences", "max_tokens", "width", "num_heads", "hidden_width", "num_layers")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"sentences.{name}: must be at least 1, got {getattr(self, name)}")
        if self.vocabulary_size < 5:
            raise ValueError(
                f"sentences.vocabulary_size: must be at least 5, got {self.vocabulary_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"sentences.num_heads: {self.num_heads} heads do not divide width {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"sentences.dropout: must be in [0, 1), got {self.dropout}")
        check_norm("sentences", C=self.C, width=self.width)


class Labelled(NamedTuple):
    """A sentence and its class."""

    text: str
    label: int


class LabelledParts(NamedTuple):
    """The parts of a data set."""

    train: list[Labelled]
    valid: list[Labelled]
    test: list[Labelled]


class SentenceBatch(NamedTuple):
    """Sentences of similar length."""

    tokens: Tensor
    """Padded on the right (B,S)."""
    labels: Tensor
    """Int64 (B,)."""


def load_sentences(config: SentenceConfig) -> LabelledParts:
    """Read or make the data set of a configuration.

    Raises:
        ValueError: A file is missing or cannot be read; the message names it.
    """
    raw = Path(config.raw)
    match config.dataset:
        case "tiny":
            return _tiny(config.tiny_sentences)
        case "rt":
            return _rt(raw, config.split_seed)
        case "sst5":
            paths = [need_file(raw, f"stsa.fine.{name}") for name in ("train", "dev", "test")]
            return LabelledParts(*map(_labelled, paths))


def num_classes(config: SentenceConfig) -> int:
    """Classes of a data set."""
    return {"tiny": 2, "rt": 2, "sst5": 5}[config.dataset]


def _labelled(path: Path) -> list[Labelled]:
    """Lines of a class, a space and a sentence."""
    sentences = []
    for number, line in enumerate(read_lines(path), start=1):
        label, _, text = line.partition(" ")
        if label not in ("0", "1", "2", "3", "4"):
            raise ValueError(f"{path}: line {number} does not begin with a class from 0 to 4")
        sentences.append(Labelled(text, int(label)))
    return sentences


def _rt(raw: Path, seed: int) -> LabelledParts:
    """The paper's sizes, drawn at random; it does not use one of the 10,662 sentences."""
    sides = [read_lines(need_file(raw, f"rt-polarity.{side}")) for side in ("neg", "pos")]
    sentences = [Labelled(text, label) for label, lines in enumerate(sides) for text in lines]
    if len(sentences) < sum(_RT_SPLIT):
        raise ValueError(f"{raw}: {len(sentences)} sentences, {sum(_RT_SPLIT)} are needed")
    order = np.random.default_rng(seed).permutation(len(sentences))
    first, second = _RT_SPLIT[0], sum(_RT_SPLIT[:2])
    parts = (slice(first), slice(first, second), slice(second, sum(_RT_SPLIT)))
    return LabelledParts(*([sentences[place] for place in order[part]] for part in parts))


def _tiny(count: int, *, seed: int = 1) -> LabelledParts:
    """Made reviews that are good (1) or bad (0) throughout; ``not`` turns the word after it."""
    random = np.random.default_rng(seed)

    def sentence() -> Labelled:
        label, words = int(random.integers(2)), list[str]()
        for _ in range(random.integers(2, 5)):
            turned = int(random.random() < 0.25)
            words += [f"plain{random.integers(9)}"] * int(random.integers(2)) + ["not"] * turned
            words.append(f"{('bad', 'good')[label ^ turned]}{random.integers(6)}")
        return Labelled(" ".join(words), label)

    def part(size: int) -> list[Labelled]:
        return [sentence() for _ in range(size)]

    held_out = max(count // 10, 1)
    return LabelledParts(part(count), part(held_out), part(held_out))


class SentencePart:
    """A part of a data set as numbers.

    Args:
        sentences: The sentences.
        vocabulary: Gives words their numbers.
    """

    def __init__(self, sentences: Sequence[Labelled], vocabulary: Vocabulary) -> None:
        self._tokens = [vocabulary.encode(sentence.text) for sentence in sentences]
        self._labels = torch.tensor([sentence.label for sentence in sentences])

    def __len__(self) -> int:
        return len(self._tokens)

    def _batch(self, chosen: np.ndarray[tuple[int], np.dtype[np.int64]]) -> SentenceBatch:
        return SentenceBatch(
            pad([self._tokens[place] for place in chosen], PAD), self._labels[chosen]
        )

    def _buckets(self, max_tokens: int, seed: int = 0) -> TokenBuckets:
        lengths = [len(tokens) for tokens in self._tokens]
        return TokenBuckets(lengths, max_tokens=max_tokens, seed=seed)

    def batches(self, max_tokens: int, *, seed: int) -> Batches[SentenceBatch]:
        """Shuffled batches of each epoch."""
        buckets = self._buckets(max_tokens, seed)
        return lambda epoch: MappedSequence(self._batch, buckets(epoch))

    def in_order(self, max_tokens: int) -> list[SentenceBatch]:
        """Batches for evaluation."""
        return [self._batch(chosen) for chosen in self._buckets(max_tokens).in_order()]


def make_vocabulary(config: SentenceConfig, sentences: Sequence[Labelled]) -> Vocabulary:
    """The most frequent words of the training sentences."""
    return frequent_words((sentence.text for sentence in sentences), config.vocabulary_size)


class SentenceClassifier(nn.Module):
    """A Transformer encoder; the mean of its states decides.

    Args:
        tokens: Embeds tokens.
        positions: Embeds their positions.
        encoder: Stack of encoder layers.
        output: Scores the classes of a state.
        dropout: Share set to zero in training, of the embeddings and of the mean.
    """

    def __init__(
        self,
        tokens: nn.Module,
        positions: nn.Module,
        *,
        encoder: Encoder,
        output: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.encoder = encoder
        self.output = output
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map sentences (B,S), padded on either side, to scores of the classes (B,classes)."""
        x = self.dropout(self.tokens(tokens) + self.positions(tokens))
        states = self.encoder(x, mask=padding_mask(tokens, PAD))
        real = (tokens != PAD).unsqueeze(-1)
        mean = (states * real).sum(dim=1) / real.sum(dim=1)
        scores: Tensor = self.output(self.dropout(mean))
        return scores


def build_sentence_classifier(config: SentenceConfig, vocabulary_size: int) -> SentenceClassifier:
    """Compose the model that ``config`` describes, with fresh parameters."""
    width = config.width
    norm: Callable[[int], nn.Module] = norm_factory(config.norm, C=config.C)
    layers = [
        EncoderLayer(
            MultiHeadAttention(width, config.num_heads),
            FeedForward(width, config.hidden_width),
            residual=partial(PreNorm, width, norm=norm, dropout=config.dropout),
        )
        for _ in range(config.num_layers)
    ]
    return SentenceClassifier(
        TokenEmbedding(vocabulary_size, width=width, padding_index=PAD),
        SinusoidalPositions(width, padding_index=PAD, max_length=256),
        encoder=Encoder(layers, final_norm=norm(width)),
        output=nn.Linear(width, num_classes(config)),
        dropout=config.dropout,
    )
