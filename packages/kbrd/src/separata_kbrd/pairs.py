"""The turn pairs of a part of the data as flat arrays, and batches of them.

P is the number of pairs of a part, B of a batch, I of instances (a pair and one target of it).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.data import Batches, MappedSequence, TokenBuckets, pad
from separata_shared.data.prepared import read_array
from separata_shared.files import read_json, write_json
from torch import Tensor

from .graph import Ints
from .redial import TurnPair
from .words import END, NULL

Mentions = Literal["set", "list"]
"""Mentioned nodes: each once in ascending order, or in the order of the dialog with repeats."""


class RecommenderBatch(NamedTuple):
    """Pairs with a target, and their instances."""

    nodes: Tensor
    """Mentioned nodes (B, n), padded on the right with 0."""
    mask: Tensor
    """True where ``nodes`` is not padding (B, n)."""
    row: Tensor
    """Row of each instance's pair (I,), ascending."""
    target: Tensor
    """Node to recommend (I,)."""
    turn: Tensor
    """Number of each instance's pair in its dialog (I,), from 1."""
    context: Tensor
    """Items mentioned before the answer, oldest first, with repeats (B, c), padded with -1."""


class DialogBatch(NamedTuple):
    """Pairs as text."""

    xs: Tensor
    """Tokens of all earlier turns and of the seeker's (B, S), padded on the right with 0."""
    ys: Tensor
    """Tokens of the answer and its end (B, T), padded on the right with 0."""
    nodes: Tensor
    """Mentioned nodes (B, n), padded on the right with 0."""
    mask: Tensor
    """True where ``nodes`` is not padding (B, n)."""
    context: Tensor
    """Items mentioned before the answer, oldest first, with repeats (B, c), padded with -1."""
    pair: Tensor
    """Number of each pair in its part (B,)."""


@dataclass(frozen=True)
class Flow:
    """Numbers (tokens or nodes) in the order in which the dialogs bring them."""

    values: NDArray[np.int32]
    bounds: Ints
    """Of each pair where dialog, question and answer begin and where it ends, (P, 4)."""

    def before(self, pair: int) -> NDArray[np.int32]:
        """What comes before the answer: all earlier pairs of the dialog, and the seeker's turn."""
        return self.values[self.bounds[pair, 0] : self.bounds[pair, 2]]

    def question(self, pair: int) -> NDArray[np.int32]:
        """What the seeker's turn brings."""
        return self.values[self.bounds[pair, 1] : self.bounds[pair, 2]]

    def answer(self, pair: int) -> NDArray[np.int32]:
        """What the answer brings."""
        return self.values[self.bounds[pair, 2] : self.bounds[pair, 3]]

    @classmethod
    def of(cls, pieces: Iterable[tuple[bool, Sequence[int], Sequence[int]]]) -> "Flow":
        """From what each pair brings: whether it opens a dialog, its question and its answer."""
        values: list[int] = []
        bounds = []
        dialog = 0
        for opens, question, answer in pieces:
            start = len(values)
            dialog = start if opens else dialog
            values += question
            middle = len(values)
            values += answer
            bounds.append((dialog, start, middle, len(values)))
        return cls(
            np.array(values, dtype=np.int32), np.array(bounds, dtype=np.int64).reshape(-1, 4)
        )


class Part(Sequence[TurnPair]):
    """The turn pairs of a part of the data, those without a target included.

    Args:
        texts: The seeker's and the recommender's text of each pair.
        turns: Number of each pair in its dialog, from 1, (P,).
        tokens: Tokens.
        items: Nodes of the items.
        entities: Nodes that were linked.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, str]],
        *,
        turns: Ints,
        tokens: Flow,
        items: Flow,
        entities: Flow,
    ) -> None:
        self.texts = texts
        self.turns = turns
        self.tokens = tokens
        self.items = items
        self.entities = entities

    @classmethod
    def of(cls, pairs: Iterable[TurnPair], encode: Callable[[str], Sequence[int]]) -> "Part":
        """From turn pairs and the function that makes tokens of a text."""
        pairs = list(pairs)
        return cls(
            [(pair.text, pair.label) for pair in pairs],
            turns=np.array([pair.turn for pair in pairs], dtype=np.int64),
            tokens=Flow.of((pair.opens, encode(pair.text), encode(pair.label)) for pair in pairs),
            items=Flow.of((pair.opens, pair.items, pair.targets) for pair in pairs),
            entities=Flow.of((pair.opens, pair.entities, pair.label_entities) for pair in pairs),
        )

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> TurnPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TurnPair]: ...
    def __getitem__(self, index: int | slice) -> TurnPair | list[TurnPair]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        pair = range(len(self))[index]
        text, label = self.texts[pair]
        turn = int(self.turns[pair])
        return TurnPair(
            opens=turn == 1,
            turn=turn,
            text=text,
            label=label,
            items=tuple(self.items.question(pair).tolist()),
            entities=tuple(self.entities.question(pair).tolist()),
            targets=tuple(self.items.answer(pair).tolist()),
            label_entities=tuple(self.entities.answer(pair).tolist()),
            context_items=tuple(self.items.before(pair).tolist()),
            context_entities=tuple(self.entities.before(pair).tolist()),
        )

    @property
    def with_target(self) -> Ints:
        """Numbers of the pairs whose answer names an item."""
        return np.flatnonzero(self.items.bounds[:, 2] < self.items.bounds[:, 3])

    @property
    def num_instances(self) -> int:
        """Pairs of a turn pair and one of its distinct targets."""
        return sum(len(np.unique(self.items.answer(pair))) for pair in self.with_target.tolist())

    def mentioned(self, pair: int, mentions: Mentions) -> NDArray[np.int32]:
        """Nodes that were mentioned before the answer: items, then linked nodes."""
        nodes = np.concatenate([self.items.before(pair), self.entities.before(pair)])
        return np.unique(nodes) if mentions == "set" else nodes

    def recommender_batches(
        self, size: int, *, seed: int, mentions: Mentions
    ) -> Batches[RecommenderBatch]:
        """Shuffled batches of each epoch for the recommender.

        Args:
            size: Pairs of a batch, those without a target included as in the authors' code; what
                is given leaves them out.
            seed: Seed of the order.
            mentions: How mentioned nodes are listed.

        Raises:
            ValueError: No pair has a target.
        """
        has_target = np.zeros(len(self), dtype=bool)
        has_target[self.with_target] = True
        if not has_target.any():
            raise ValueError("no answer of the training part names an item of the catalogue")

        def epoch_batches(epoch: int) -> MappedSequence[RecommenderBatch]:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))
            cut = (order[start : start + size] for start in range(0, len(order), size))
            kept = [chosen for one in cut if len(chosen := one[has_target[one]])]
            return MappedSequence(lambda pairs: self._recommender_batch(pairs, mentions), kept)

        return epoch_batches

    def recommender_in_order(
        self, size: int, *, mentions: Mentions
    ) -> MappedSequence[RecommenderBatch]:
        """Batches of ``size`` pairs with a target, in order, for evaluation."""
        pairs = self.with_target
        cut = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return MappedSequence(lambda chosen: self._recommender_batch(chosen, mentions), cut)

    def dialog_batches(
        self, size: int, *, seed: int, mentions: Mentions, max_length: int
    ) -> Batches[DialogBatch]:
        """Shuffled batches of each epoch for the dialog model, texts of similar length together.

        Args:
            size: Pairs of a batch.
            seed: Seed of the order.
            mentions: How mentioned nodes are listed.
            max_length: Tokens kept: the last ones before the answer, the first ones of the answer.

        Raises:
            ValueError: There is no pair.
        """
        buckets = self._buckets(size, seed, max_length)
        return lambda epoch: MappedSequence(
            lambda pairs: self._dialog_batch(pairs, mentions, max_length), buckets(epoch)
        )

    def dialog_in_order(
        self, size: int, *, mentions: Mentions, max_length: int
    ) -> MappedSequence[DialogBatch]:
        """Batches for evaluation, the longest texts first; ``pair`` says which pairs they hold."""
        return MappedSequence(
            lambda pairs: self._dialog_batch(pairs, mentions, max_length),
            self._buckets(size, 0, max_length).in_order(),
        )

    def _buckets(self, size: int, seed: int, max_length: int) -> TokenBuckets:
        dialog, _, answer, end = self.tokens.bounds.T
        lengths = np.minimum(np.stack([answer - dialog, end - answer + 1], axis=1), max_length)
        # Batches have a fixed number of pairs, whatever their length.
        return TokenBuckets(lengths, max_tokens=size * max_length, max_sentences=size, seed=seed)

    def _recommender_batch(self, pairs: Ints, mentions: Mentions) -> RecommenderBatch:
        numbers = pairs.tolist()
        targets = [list(dict.fromkeys(self.items.answer(pair).tolist())) for pair in numbers]
        row = np.repeat(np.arange(len(targets)), [len(found) for found in targets])
        nodes, mask = pad_nodes([self.mentioned(pair, mentions) for pair in numbers])
        return RecommenderBatch(
            nodes=nodes,
            mask=mask,
            row=torch.from_numpy(row),
            target=torch.tensor([node for found in targets for node in found]),
            turn=torch.from_numpy(self.turns[pairs[row]]),
            context=pad([self.items.before(pair) for pair in numbers], -1),
        )

    def _dialog_batch(self, pairs: Ints, mentions: Mentions, max_length: int) -> DialogBatch:
        numbers = pairs.tolist()
        xs = [self.tokens.before(pair)[-max_length:] for pair in numbers]
        ys = [np.append(self.tokens.answer(pair), END)[:max_length] for pair in numbers]
        nodes, mask = pad_nodes([self.mentioned(pair, mentions) for pair in numbers])
        return DialogBatch(
            # A batch of nothing but empty texts is one column of padding.
            xs=pad(xs, NULL, length=max(1, *(len(tokens) for tokens in xs))),
            ys=pad(ys, NULL),
            nodes=nodes,
            mask=mask,
            context=pad([self.items.before(pair) for pair in numbers], -1),
            pair=torch.from_numpy(pairs),
        )

    def save(self, directory: Path, name: str) -> None:
        """Write the part into a directory of prepared data."""
        write_json(directory / f"{name}.texts.json", self.texts)
        np.save(directory / f"{name}.turns.npy", self.turns)
        for kind, flow in self._flows.items():
            np.save(directory / f"{name}.{kind}.npy", flow.values)
            np.save(directory / f"{name}.{kind}.bounds.npy", flow.bounds)

    @classmethod
    def load(cls, directory: Path, name: str) -> "Part":
        """Read a part that ``save`` wrote.

        Raises:
            ValueError: A file is missing or damaged; the message names it.
        """
        flows = {
            kind: Flow(
                read_array(directory / f"{name}.{kind}.npy"),
                read_array(directory / f"{name}.{kind}.bounds.npy"),
            )
            for kind in ("tokens", "items", "entities")
        }
        texts = [(text, label) for text, label in read_json(directory / f"{name}.texts.json")]
        return cls(texts, turns=read_array(directory / f"{name}.turns.npy"), **flows)

    @property
    def _flows(self) -> dict[str, Flow]:
        return {"tokens": self.tokens, "items": self.items, "entities": self.entities}


def pad_nodes(rows: Sequence[Sequence[int] | NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Nodes (B, n) padded on the right with 0, and where they are not padding (B, n)."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    nodes = pad(rows, 0)
    return nodes, torch.arange(nodes.shape[1]) < lengths[:, None]
