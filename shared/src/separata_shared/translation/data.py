"""Prepared data as the model sees it: token sequences, splits, batches.

Three levels of data go through the same code: ``tiny`` is made when it is loaded, ``sample`` comes
out of two pip packages, all others out of files; ``prepare`` turns the latter two into a directory
that ``load`` maps into memory.

Shapes: B sentences, S source tokens, T target tokens, N sentences of a split.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from separata_shared.data import Batches, MappedSequence, TokenBuckets, pad
from separata_shared.data.characters import Characters, number_characters, tiny_characters
from separata_shared.data.collate import to_device
from separata_shared.data.prepared import open_prepared, read_array
from separata_shared.data.vocabulary import (
    EOS,
    PAD,
    Vocabulary,
    frequent_words,
    train_subwords,
)
from separata_shared.files import read_lines
from separata_shared.translation import corpora
from separata_shared.translation.config import CHARACTERS, DataConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sequences:
    """Token sequences in one flat array, so that millions of them cost nothing to open."""

    tokens: NDArray[np.integer]
    """All sequences one after another."""

    offsets: NDArray[np.int64]
    """Where each begins; one more entry at the end. Shape (N + 1)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.integer]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, end mark included. Shape (N)."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, rows: Iterable[NDArray[np.integer]]) -> "Sequences":
        """Join separate rows."""
        rows = list(rows)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return cls(tokens, offsets)


@dataclass(frozen=True)
class ParallelBatch:
    """A few sentence pairs, padded on the right with ``PAD``."""

    source: Tensor
    """Source tokens, ``EOS`` at the end. Shape (B, S)."""

    decoder_input: Tensor
    """Target tokens moved one to the right, beginning with ``EOS`` as in fairseq. Shape (B, T)."""

    target: Tensor
    """Target tokens, ``EOS`` at the end. Shape (B, T)."""

    indices: Tensor
    """Place of each pair in its split. Shape (B)."""

    def to(self, device: torch.device | str) -> "ParallelBatch":
        """The batch on another device."""
        return ParallelBatch(*(to_device(tensor, device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Split:
    """Sentence pairs of one part of a corpus."""

    source: Sequences
    target: Sequences
    source_lines: tuple[str, ...] = ()
    """Text of the source sentences; empty for a prepared training part."""

    target_lines: tuple[str, ...] = ()
    """Reference translations; empty for a prepared training part."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of source and target of each pair. Shape (N, 2)."""
        return np.stack([self.source.lengths, self.target.lengths], axis=1)

    def batches(self, max_tokens: int, *, seed: int) -> Batches[ParallelBatch]:
        """Shuffled batches of at most ``max_tokens`` padded tokens on each side, by epoch."""
        buckets = TokenBuckets(self.lengths, max_tokens=max_tokens, seed=seed)
        return lambda epoch: MappedSequence(self.batch, buckets(epoch))

    def in_order(self, max_tokens: int) -> Sequence[ParallelBatch]:
        """All pairs once, in batches by falling length; ``indices`` tells where each belongs."""
        buckets = TokenBuckets(self.lengths, max_tokens=max_tokens)
        return MappedSequence(self.batch, buckets.in_order())

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> ParallelBatch:
        """The pairs of these numbers as padded tensors."""
        target = pad([self.target[n] for n in indices], PAD)
        begin = target.new_full((len(target), 1), EOS)
        decoder_input = torch.cat([begin, target[:, :-1]], dim=1)
        # The end mark of a shorter sentence is its last target, never an input.
        decoder_input[:, 1:][decoder_input[:, 1:] == EOS] = PAD
        return ParallelBatch(
            pad([self.source[n] for n in indices], PAD),
            decoder_input,
            target,
            torch.as_tensor(np.asarray(indices, dtype=np.int64)),
        )


@dataclass(frozen=True)
class Corpus:
    """Sentence pairs in three parts, and the vocabularies of their two sides."""

    train: Split
    valid: Split
    test: Split
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary


def learn_vocabularies(text: corpora.Text, data: DataConfig) -> tuple[Vocabulary, Vocabulary]:
    """Source and target vocabulary of a training text; the same one when they are joint.

    Raises:
        ValueError: The text does not give a vocabulary of ``data.vocabulary_size``.
    """
    train = text.train

    def learn(lines: tuple[str, ...]) -> Vocabulary:
        try:
            if data.segmentation == "words":
                return frequent_words(lines, data.vocabulary_size)
            return train_subwords(lines, data.vocabulary_size, kind=data.segmentation)
        except ValueError as error:
            raise ValueError(f"data.vocabulary_size: {error}") from None

    if data.vocabularies == "joint":
        joint = learn(train.source + train.target)
        return joint, joint
    return learn(train.source), learn(train.target)


def tokenise(
    text: corpora.Text, data: DataConfig, vocabularies: tuple[Vocabulary, Vocabulary]
) -> Corpus:
    """Turn the lines of a text into tokens.

    A training pair with an empty or too long side is left out.

    Raises:
        ValueError: A validation or test sentence is longer than ``data.max_length``, or no training
            pair is left.
    """
    source_vocabulary, target_vocabulary = vocabularies
    splits: dict[str, Split] = {}
    for name, lines in text.splits.items():
        source = _encode(source_vocabulary, lines.source)
        target = _encode(target_vocabulary, lines.target)
        longest = [max(len(a), len(b)) for a, b in zip(source, target, strict=True)]
        shortest = [min(len(a), len(b)) for a, b in zip(source, target, strict=True)]
        kept = list(range(len(source)))
        if name == "train":
            # One token is the end mark alone.
            kept = [n for n in kept if shortest[n] > 1 and longest[n] <= data.max_length]
        elif max(longest) > data.max_length:
            worst = next(n for n in kept if longest[n] > data.max_length)
            raise ValueError(
                f"{name} sentence {worst + 1} has {longest[worst]} tokens, more than "
                f"data.max_length {data.max_length}: raise it or shorten the sentence"
            )
        if not kept:
            raise ValueError(f"the {name} part has no sentence of at most data.max_length tokens")
        splits[name] = Split(
            Sequences.of(source[n] for n in kept),
            Sequences.of(target[n] for n in kept),
            tuple(lines.source[n] for n in kept),
            tuple(lines.target[n] for n in kept),
        )
    return Corpus(
        **splits, source_vocabulary=source_vocabulary, target_vocabulary=target_vocabulary
    )


def _encode(vocabulary: Vocabulary, lines: Sequence[str]) -> list[NDArray[np.int32]]:
    # The bar shows only where this takes a while.
    return [
        vocabulary.encode(line)
        for line in tqdm(lines, desc="tokenising", delay=2, disable=None, leave=False)
    ]


def settings(data: DataConfig) -> dict[str, Any]:
    """The fields of a configuration on which the prepared files depend."""
    names = ["dataset", "lowercase", "segmentation", "vocabulary_size", "vocabularies"]
    names += ["source_language", "target_language", "max_length"]
    if data.dataset in CHARACTERS:
        names = ["dataset", "train_bytes"]
    return {name: getattr(data, name) for name in names}


def load(data: DataConfig) -> Corpus:
    """Open a parallel corpus: ``tiny`` is made, the others are read from ``data.prepared``.

    Raises:
        ValueError: The corpus was not prepared, or otherwise than ``data`` says, or is damaged.
    """
    if data.dataset in CHARACTERS:
        raise ValueError(f"data.dataset: {data.dataset} is not a parallel text")
    if data.dataset == "tiny":
        text = corpora.tiny(
            data.tiny_task,
            pairs=data.tiny_pairs,
            symbols=data.tiny_symbols,
            length=data.tiny_length,
        )
        data = replace(data, segmentation="words")
        return tokenise(text, data, learn_vocabularies(text, data))
    directory = Path(data.prepared)
    manifest = open_prepared(directory, settings(data))
    vocabularies = {}
    for side in ("source", "target"):
        vocabularies[side] = Vocabulary.load(directory / f"{side}.vocabulary")
        vocabularies[side].check(manifest["vocabularies"][side], directory)
    sizes = {side: len(vocabulary) for side, vocabulary in vocabularies.items()}
    return Corpus(
        **{name: _read_split(directory, name, sizes) for name in SPLITS},
        source_vocabulary=vocabularies["source"],
        target_vocabulary=vocabularies["target"],
    )


def _consistent(
    tokens: NDArray[np.integer], offsets: NDArray[np.int64], vocabulary_size: int
) -> bool:
    """Whether the arrays of a side can be sequences of tokens of its vocabulary."""
    if tokens.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2 or not len(tokens):
        return False
    rising = offsets[0] == 0 and offsets[-1] == len(tokens) and bool((np.diff(offsets) > 0).all())
    return rising and int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary_size


def _read_split(directory: Path, name: str, sizes: Mapping[str, int]) -> Split:
    sides = []
    for side in ("source", "target"):
        tokens = read_array(directory / f"{name}.{side}.tokens.npy")
        offsets = read_array(directory / f"{name}.{side}.offsets.npy")
        if not _consistent(tokens, offsets, sizes[side]):
            raise ValueError(f"{directory}: {name}.{side} arrays disagree; prepare the data again")
        sides.append(Sequences(tokens, offsets))
    source, target = sides
    if name == "train":
        return Split(source, target)
    lines = [tuple(read_lines(directory / f"{name}.{side}.txt")) for side in ("source", "target")]
    return Split(source, target, *lines)


def load_characters(data: DataConfig) -> Characters:
    """Open a text for the language model: ``tiny_characters`` is made, ``enwik8`` is prepared.

    Raises:
        ValueError: The text was not prepared, or otherwise than ``data`` says, or is damaged.
    """
    if data.dataset not in CHARACTERS:
        raise ValueError(f"data.dataset: {data.dataset} is a parallel text, not characters")
    if data.dataset == "tiny_characters":
        return number_characters(*tiny_characters(data.tiny_pairs * 10))
    directory = Path(data.prepared)
    manifest = open_prepared(directory, settings(data))
    parts = {name: read_array(directory / f"{name}.symbols.npy") for name in SPLITS}
    return Characters(**parts, alphabet=bytes(manifest["alphabet"]))
