"""Batches by number of tokens, addressed by (epoch, index) so that a run can resume anywhere."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Batch = TypeVar("Batch")
Batches = Callable[[int], Sequence[Batch]]
"""Batches of an epoch: a pure function of the epoch's number."""

Indices = NDArray[np.int64]


class TokenBuckets:
    """Cuts sentences into batches of similar length and at most ``max_tokens`` padded tokens.

    An epoch is a pure function of (lengths, settings, seed, epoch): it holds every sentence once.
    Sentences of equal length are shuffled among each other, and so are the finished batches.

    Args:
        lengths: Tokens of each sentence, (N,); or of its sides, (N, sides). The padded tokens of a
            batch are its sentences times its longest side.
        max_tokens: Most padded tokens of a batch.
        max_sentences: Most sentences of a batch.
        multiple: Batches of more than ``multiple`` sentences hold a multiple of it, as fairseq does
            for tensor cores.
        seed: Seed of the order.

    Raises:
        ValueError: There is no sentence, or one has more than ``max_tokens`` tokens.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        max_tokens: int,
        max_sentences: int | None = None,
        multiple: int = 1,
        seed: int = 0,
    ) -> None:
        sides = np.asarray(lengths, dtype=np.int64)
        self._sides = sides[:, None] if sides.ndim == 1 else sides
        if not len(sides):
            raise ValueError("no sentences to make batches of")
        self._longest = np.maximum(self._sides.max(axis=1), 1)
        self._max_tokens = max_tokens
        self._max_sentences = max_sentences or len(sides)
        self._multiple = multiple
        self._seed = seed
        if self._longest.max() > max_tokens:
            index = int(np.argmax(self._longest > max_tokens))
            raise ValueError(
                f"sentence {index + 1} has {self._longest[index]} tokens, more than the "
                f"max_tokens of a batch, {max_tokens}"
            )

    def __call__(self, epoch: int) -> list[Indices]:
        """Batches of an epoch in training order, each an array of sentence numbers (B,)."""
        random = np.random.default_rng((self._seed, epoch))
        batches = self._cut(random.permutation(len(self._sides)))
        return [batches[i] for i in random.permutation(len(batches))]

    def in_order(self) -> list[Indices]:
        """Batches by falling length, for evaluation: the largest first, nothing random."""
        return self._cut(np.arange(len(self._sides)))[::-1]

    def _cut(self, order: Indices) -> list[Indices]:
        # The sort is stable: equal lengths stay in the given order. The last side counts most.
        order = order[np.lexsort(self._sides[order].T)]
        longest = self._longest[order]
        batches, start = [], 0
        while start < len(order):
            most = min(self._max_tokens // longest[start], self._max_sentences)
            width = np.maximum.accumulate(longest[start : start + most])
            cost = width * np.arange(1, len(width) + 1)
            size = int(np.searchsorted(cost, self._max_tokens, side="right"))
            if size > self._multiple:
                size -= size % self._multiple
            batches.append(order[start : start + size])
            start += size
        return batches


class MappedSequence(Sequence[Batch], Generic[Batch]):
    """``make(item)`` for each item, made when it is asked for.

    Args:
        make: Makes a batch, from sentence numbers for example.
        items: What the batches are made from.
    """

    def __init__(self, make: Callable[[Indices], Batch], items: Sequence[Indices]) -> None:
        self._make = make
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "MappedSequence[Batch]": ...
    def __getitem__(self, index: int | slice) -> "Batch | MappedSequence[Batch]":
        if isinstance(index, slice):
            return MappedSequence(self._make, self._items[index])
        return self._make(self._items[index])


class BatchStream(Generic[Batch]):
    """The batches of all epochs one after another, from any position on.

    Args:
        batches: Batches of each epoch.
        epoch: Epoch of the next batch.
        index: Place of the next batch in that epoch.
    """

    def __init__(self, batches: Batches[Batch], *, epoch: int = 0, index: int = 0) -> None:
        self._batches = batches
        self.epoch = epoch
        self.index = index
        self._current = self._open(epoch)

    def _open(self, epoch: int) -> Sequence[Batch]:
        current = self._batches(epoch)
        if not len(current):
            raise ValueError(f"epoch {epoch} has no batches")
        return current

    def take(self, count: int, *, rank: int = 0, size: int = 1) -> Iterator[tuple[int, int, Batch]]:
        """Pass over the next ``count`` batches and give every ``size``-th of them.

        Args:
            count: How many batches of the stream are used up.
            rank: The first of them to give.
            size: Distance between those given.

        Yields:
            Epoch, index and batch.
        """
        for number in range(count):
            while self.index >= len(self._current):
                self.index -= len(self._current)
                self.epoch += 1
                self._current = self._open(self.epoch)
            if number % size == rank:
                yield self.epoch, self.index, self._current[self.index]
            self.index += 1
