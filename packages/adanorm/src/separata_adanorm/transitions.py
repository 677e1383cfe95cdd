"""Arc-standard transitions for many sentences at once (Nivre 2004; Chen and Manning 2014).

The words of a sentence are numbered from 1, 0 is the root. ``NOBODY`` is an index behind all words,
so that asking for the child of a missing child needs no special case.

A transition is a number: 0 shifts, ``1 + 2 l`` makes the top of the stack the head of the word
below it with label ``l`` (left arc), ``2 + 2 l`` the word below the head of the top (right arc).

Shapes: B sentences by falling length, A those of them that are not finished, W columns: root, words
of the longest sentence, nobody.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

SHIFT = 0
NOBODY = -1
WORD_POSITIONS = 18
LABEL_POSITIONS = 12


def left_arc(label: Ints) -> Ints:
    """Number of the left arc with ``label``."""
    return 1 + 2 * label


def right_arc(label: Ints) -> Ints:
    """Number of the right arc with ``label``."""
    return 2 + 2 * label


def num_transitions(num_labels: int) -> int:
    """How many different transitions there are with so many labels."""
    return 1 + 2 * num_labels


class States:
    """The state of the parser in each of several sentences.

    A sentence of n words is finished after 2 n transitions; as the sentences are sorted, those that
    are not finished are always the first ones.

    Args:
        lengths: Words of each sentence, falling, at least one (B,).

    Raises:
        ValueError: ``lengths`` does not fall, or a sentence is empty.
    """

    def __init__(self, lengths: Ints) -> None:
        if (len(lengths) and lengths[-1] < 1) or (np.diff(lengths) > 0).any():
            raise ValueError("sentences must have words and be sorted by falling length")
        shape = len(lengths), int(lengths.max(initial=0)) + 2
        self.lengths = lengths
        self.steps = 0
        self.heads = np.full(shape, NOBODY, dtype=np.int32)
        """Head found for each word (B,W)."""
        self.labels = np.full(shape, NOBODY, dtype=np.int32)
        """Label of the arc to it (B,W)."""
        self._stack = np.full(shape, NOBODY, dtype=np.int32)
        self._stack[:, 0] = 0
        self._depth = np.ones(len(lengths), dtype=np.int32)
        self._front = np.ones(len(lengths), dtype=np.int32)
        # Of each word the leftmost, second leftmost, rightmost and second rightmost child.
        self._children = np.full((4, *shape), NOBODY, dtype=np.int32)

    @property
    def active(self) -> int:
        """Number A of the sentences that are not finished."""
        return int(np.searchsorted(-2 * self.lengths, -self.steps))

    def _on_stack(self, place: int) -> Ints:
        """The word at a place of each stack (A,), 1 is the top."""
        rows = np.arange(self.active)
        # A place below the bottom is looked up where nobody stands.
        found: Ints = self._stack[rows, np.maximum(self._depth[rows] - place, NOBODY)]
        return found

    def positions(self) -> Ints:
        """Words that the features describe (A,18).

        The three topmost words of the stack, the first three of the buffer, and for each of the
        two topmost words of the stack: leftmost and rightmost child, second leftmost and second
        rightmost child, leftmost child of the leftmost, rightmost child of the rightmost.
        """
        rows = np.arange(self.active)
        stack = [self._on_stack(place) for place in (1, 2, 3)]
        ahead = [self._front[rows] + place for place in range(3)]
        buffer = [np.where(word <= self.lengths[rows], word, NOBODY) for word in ahead]
        children = []
        for word in stack[:2]:
            first_left, second_left, first_right, second_right = self._children[:, rows, word]
            children += [first_left, first_right, second_left, second_right]
            children += [self._children[0, rows, first_left], self._children[2, rows, first_right]]
        return np.stack([*stack, *buffer, *children], axis=1)

    def allowed(self) -> tuple[Bools, Bools, Bools]:
        """Whether each unfinished sentence may shift, make a left arc, make a right arc: (A,) each.

        The root takes one child, as the last arc; so every tree has one root.
        """
        rows = np.arange(self.active)
        depth, shift = self._depth[rows], self._front[rows] <= self.lengths[rows]
        return shift, depth > 2, (depth > 2) | ((depth == 2) & ~shift)

    def apply(self, transitions: Ints) -> None:
        """Make one transition in each unfinished sentence (A,)."""
        rows = np.arange(len(transitions))
        shifts = transitions == SHIFT
        row = rows[shifts]
        self._stack[row, self._depth[row]] = self._front[row]
        self._depth[row] += 1
        self._front[row] += 1
        row, arcs = rows[~shifts], transitions[~shifts]
        top, below = (self._stack[row, self._depth[row] - place] for place in (1, 2))
        is_left = arcs % 2 == 1
        head, child = np.where(is_left, top, below), np.where(is_left, below, top)
        self.heads[row, child] = head
        self.labels[row, child] = (arcs - 1) // 2
        # Children come from near to far, so the new one is the outermost.
        outermost = np.where(is_left, 0, 2)
        self._children[outermost + 1, row, head] = self._children[outermost, row, head]
        self._children[outermost, row, head] = child
        self._depth[row] -= 1
        self._stack[row, self._depth[row] - 1] = head
        self.steps += 1


class Oracle:
    """The transitions that lead to given trees: an arc as soon as the child has all its children.

    Args:
        states: States of the same sentences, which somebody else moves on.
        heads: True head of each word, the other columns ``NOBODY`` (B,W).
        labels: Label of the arc to it (B,W).
    """

    def __init__(self, states: States, heads: Ints, labels: Ints) -> None:
        self._states, self._heads, self._labels = states, heads, np.maximum(labels, 0)
        self.derivable: Bools = np.all((heads < 0) | (labels >= 0), axis=1)
        """Whether the tree can still be reached (B,); not if arcs cross, a label is unknown (-1) or
        the root has two children."""
        self._missing = np.zeros_like(heads)
        rows, words = np.nonzero(heads >= 0)
        np.add.at(self._missing, (rows, heads[rows, words]), 1)

    def transitions(self) -> Ints:
        """The next transition of each unfinished sentence (A,).

        Where the tree cannot be reached any more it is one that is allowed.
        """
        states, rows = self._states, np.arange(self._states.active)
        top, below = states._on_stack(1), states._on_stack(2)
        shift, left, right = states.allowed()
        left &= (self._heads[rows, below] == top) & (self._missing[rows, below] == 0)
        wanted = (self._heads[rows, top] == below) & (self._missing[rows, top] == 0)
        stuck = ~shift & ~left & ~wanted
        self.derivable[rows] &= ~stuck
        right &= wanted | stuck
        arcs = left | right
        found = np.where(left, left_arc(self._labels[rows, below]), SHIFT)
        found = np.where(right & ~left, right_arc(self._labels[rows, top]), found)
        self._missing[rows[arcs], np.where(left, top, below)[arcs]] -= 1
        return found.astype(np.int32)
