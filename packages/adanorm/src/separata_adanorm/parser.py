"""A greedy transition-based dependency parser (Chen and Manning 2014), for many sentences at once.

Shapes: B sentences, A those that are not finished, N states, F features of a state, W columns of a
sentence (root, words, nobody), M width of an embedding, H hidden units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .transitions import (
    LABEL_POSITIONS,
    SHIFT,
    WORD_POSITIONS,
    Ints,
    Oracle,
    States,
    num_transitions,
)
from .treebank import Encoded, Lexicon, Sentence

NUM_FEATURES = 2 * WORD_POSITIONS + LABEL_POSITIONS


class TransitionClassifier(nn.Module):
    """Scores the next transition: embeddings, one hidden layer, normalised before its activation.

    Args:
        num_symbols: Rows of the table of words, tags and labels.
        num_classes: Transitions.
        embedding_width: Width M of an embedding.
        hidden_width: Hidden units H.
        norm: Makes the norm of a width.
        dropout: Share of hidden units set to zero in training.
    """

    def __init__(
        self,
        num_symbols: int,
        num_classes: int,
        *,
        embedding_width: int,
        hidden_width: int,
        norm: Callable[[int], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, embedding_width)
        self.hidden = nn.Linear(NUM_FEATURES * embedding_width, hidden_width)
        self.norm = norm(hidden_width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_width, num_classes)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, features: Tensor) -> Tensor:
        """Map the features of states (N,48) to scores of the transitions (N,classes)."""
        hidden = self.norm(self.hidden(self.embedding(features).flatten(1)))
        scores: Tensor = self.output(self.dropout(F.relu(hidden)))
        return scores


def state_features(states: States, encoded: Encoded, lexicon: Lexicon) -> Ints:
    """Rows of the common table that describe each unfinished sentence (A,48).

    Words and tags at 18 positions, labels at the 12 of them that are children.
    """
    positions = states.positions()
    rows = np.arange(len(positions))[:, None]
    children = positions[:, WORD_POSITIONS - LABEL_POSITIONS :]
    # Nobody's label is -1, which gives the row before the first label's.
    labels = states.labels[rows, children] + (lexicon.first_label + 1)
    return np.concatenate(
        [encoded.words[rows, positions], encoded.tags[rows, positions], labels], axis=1
    )


@dataclass(frozen=True)
class Derivations:
    """The states on the way to true trees, and what to do in each."""

    features: Tensor
    """Int32, (N,48)."""
    transitions: Tensor
    """Int64, (N,)."""
    sentences: int
    """Sentences they come from."""
    left_out: int
    """Sentences without such a way: arcs cross, or several words are the root's children."""


def derive(encoded: Encoded, lexicon: Lexicon) -> Derivations:
    """Follow the true trees of all sentences at once; there may be none with a derivation."""
    states = States(encoded.lengths)
    oracle = Oracle(states, encoded.heads, encoded.labels)
    features, transitions, rows = [], [], []
    while states.active:
        rows.append(np.arange(states.active))
        features.append(state_features(states, encoded, lexicon))
        transitions.append(oracle.transitions())
        states.apply(transitions[-1])
    derivable = int(oracle.derivable.sum())
    kept = oracle.derivable[np.concatenate(rows)]
    return Derivations(
        features=torch.from_numpy(np.concatenate(features)[kept]),
        transitions=torch.from_numpy(np.concatenate(transitions)[kept].astype(np.int64)),
        sentences=derivable,
        left_out=len(encoded.lengths) - derivable,
    )


@dataclass(frozen=True)
class Trees:
    """Heads and labels that a parser found; columns as in ``Encoded``."""

    heads: Ints
    labels: Ints


@torch.no_grad()
def parse_encoded(model: nn.Module, encoded: Encoded, lexicon: Lexicon) -> Trees:
    """Take the best allowed transition in every sentence until all are finished."""
    states = States(encoded.lengths)
    device = next(model.parameters()).device
    directions = torch.arange(num_transitions(len(lexicon.labels)), device=device)
    directions = torch.where(directions == SHIFT, 0, 2 - directions % 2)  # shift, left, right
    while states.active:
        features = torch.from_numpy(state_features(states, encoded, lexicon))
        allowed = torch.from_numpy(np.stack(states.allowed(), axis=1))
        scores = model(features.to(device))
        scores = scores.masked_fill(~allowed.to(device)[:, directions], -torch.inf)
        states.apply(scores.argmax(dim=1).cpu().numpy().astype(np.int32))
    return Trees(states.heads, states.labels)


def parse_sentences(
    model: nn.Module, sentences: list[Sentence], lexicon: Lexicon, *, batch: int = 2000
) -> list[Sentence]:
    """The same sentences with the trees that the model finds, in their order.

    Args:
        model: A ``TransitionClassifier`` in evaluation mode.
        sentences: Tagged sentences.
        lexicon: The lexicon of the model.
        batch: Sentences that are parsed at once.
    """
    parsed: list[Sentence | None] = [None] * len(sentences)
    for start in range(0, len(sentences), batch):
        encoded = lexicon.encode(sentences[start : start + batch])
        trees = parse_encoded(model, encoded, lexicon)
        for row, place in enumerate(encoded.order):
            sentence = sentences[start + place]
            own = slice(1, len(sentence) + 1)
            parsed[start + place] = Sentence(
                words=sentence.words,
                tags=sentence.tags,
                heads=tuple(trees.heads[row, own].tolist()),
                labels=tuple(lexicon.labels[label] for label in trees.labels[row, own]),
            )
    return [sentence for sentence in parsed if sentence is not None]


@dataclass(frozen=True)
class Attachment:
    """How many words have the right head, and the right head and label."""

    words: int
    heads: int
    labelled: int

    @property
    def uas(self) -> float:
        """Unlabelled attachment score in percent."""
        return 100 * self.heads / max(self.words, 1)

    @property
    def las(self) -> float:
        """Labelled attachment score in percent."""
        return 100 * self.labelled / max(self.words, 1)


def attachment(trees: Trees, encoded: Encoded, scored: Ints) -> Attachment:
    """Compare trees with the true ones.

    Args:
        trees: What a parser found.
        encoded: The sentences with their true trees.
        scored: Numbers of the tags whose words count.
    """
    counted = (encoded.heads >= 0) & np.isin(encoded.tags, scored)
    heads = counted & (trees.heads == encoded.heads)
    labelled = heads & (trees.labels == encoded.labels)
    return Attachment(*(int(which.sum()) for which in (counted, heads, labelled)))
