import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_adanorm.transitions import (
    NOBODY,
    SHIFT,
    Oracle,
    States,
    left_arc,
    num_transitions,
    right_arc,
)

Tree = list[int]


@st.composite
def projective_trees(draw: st.DrawFn, most: int = 9) -> Tree:
    """Heads of the words of a tree without crossing arcs and with one root."""
    length = draw(st.integers(1, most))
    heads = [0] * length

    def attach(words: range, head: int) -> None:
        # A span is cut into pieces, each with a word of its own below ``head``.
        while words:
            piece = words[: draw(st.integers(1, len(words)))]
            top = draw(st.sampled_from(piece))
            heads[top - 1] = head
            attach(range(piece[0], top), top)
            attach(range(top + 1, piece[-1] + 1), top)
            words = words[len(piece) :]

    root = draw(st.integers(1, length))
    attach(range(1, root), root)
    attach(range(root + 1, length + 1), root)
    return heads


def crosses(heads: Tree) -> bool:
    """Whether two arcs cross, that of the root included: the definition, pair by pair."""
    arcs = [tuple(sorted((word, head))) for word, head in enumerate(heads, start=1)]
    return any(a < c < b < d for a, b in arcs for c, d in arcs)


def is_tree(heads: Tree) -> bool:
    """Whether every word reaches the root."""
    for word in range(1, len(heads) + 1):
        for _ in heads:
            word = heads[word - 1] if word else 0
        if word:
            return False
    return True


def arrays(trees: list[Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, heads and labels (the word's number modulo 3), the longest sentence first."""
    trees = sorted(trees, key=len, reverse=True)
    lengths = np.array([len(tree) for tree in trees], dtype=np.int32)
    heads = np.full((len(trees), lengths.max() + 2), NOBODY, dtype=np.int32)
    labels = heads.copy()
    for row, tree in enumerate(trees):
        heads[row, 1 : len(tree) + 1] = tree
        labels[row, 1 : len(tree) + 1] = np.arange(1, len(tree) + 1) % 3
    return lengths, heads, labels


def follow(trees: list[Tree]) -> tuple[States, Oracle, list[np.ndarray]]:
    lengths, heads, labels = arrays(trees)
    states = States(lengths)
    oracle, made = Oracle(states, heads, labels), []
    while states.active:
        made.append(oracle.transitions())
        states.apply(made[-1])
    return states, oracle, made


@settings(max_examples=60, deadline=None)
@given(trees=st.lists(projective_trees(), min_size=1, max_size=5))
def test_the_oracle_reaches_every_projective_tree(trees: list[Tree]) -> None:
    assert not any(crosses(tree) for tree in trees)
    _, heads, labels = arrays(trees)
    states, oracle, made = follow(trees)
    assert oracle.derivable.all()
    assert np.array_equal(states.heads, heads)
    assert np.array_equal(states.labels, labels)
    # Every word is shifted once and attached once.
    assert sum(len(step) for step in made) == 2 * sum(map(len, trees))
    assert sum((step == SHIFT).sum() for step in made) == sum(map(len, trees))


@settings(max_examples=100, deadline=None)
@given(
    heads=st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(0, n), min_size=n, max_size=n))
)
def test_derivable_means_a_tree_with_one_root_and_no_crossing_arcs(heads: Tree) -> None:
    proper = is_tree(heads) and heads.count(0) == 1 and not crosses(heads)
    assert follow([heads])[1].derivable.tolist() == [proper]


def test_a_label_that_training_never_saw_cannot_be_derived() -> None:
    lengths, heads, labels = arrays([[2, 0]])
    labels[0, 1] = -1
    assert Oracle(States(lengths), heads, labels).derivable.tolist() == [False]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), data=st.data())
def test_any_allowed_transitions_end_in_trees_with_one_root(
    lengths: list[int], data: st.DataObject
) -> None:
    lengths = sorted(lengths, reverse=True)
    states = States(np.array(lengths, dtype=np.int32))
    while states.active:
        choices = np.stack(states.allowed(), axis=1)
        assert choices.any(axis=1).all()
        states.apply(
            np.array(
                [data.draw(st.sampled_from(np.flatnonzero(row).tolist())) for row in choices],
                dtype=np.int32,
            )
        )
    for row, length in enumerate(lengths):
        heads = states.heads[row, 1 : length + 1].tolist()
        assert is_tree(heads)
        assert heads.count(0) == 1


def test_sentences_advance_independently() -> None:
    long, short = [2, 0, 2, 3], [0, 1]
    together = follow([long, short])[0]
    for row, tree in enumerate((long, short)):
        alone = follow([tree])[0]
        width = len(tree) + 1
        assert np.array_equal(together.heads[row, :width], alone.heads[0, :width])


def test_positions_are_those_of_chen_and_manning() -> None:
    # "He has good control .": the example in Figure 1 of the paper, after which RIGHT-ARC follows.
    states = States(np.array([5], dtype=np.int32))
    nsubj, amod, dobj = (np.array([label], dtype=np.int32) for label in range(3))
    shift = np.array([SHIFT], dtype=np.int32)
    for move in (shift, shift, left_arc(nsubj), shift, shift, left_arc(amod)):
        states.apply(move)
    stack, buffer, second, first = [4, 2, 0], [5, -1, -1], [1, -1, -1, -1, -1, -1], [3] + [-1] * 5
    assert states.positions()[0].tolist() == stack + buffer + first + second
    states.apply(right_arc(dobj))
    # Now "has" has one child on each side, and "control" has a left child itself.
    assert states.positions()[0].tolist() == [2, 0, -1, 5, -1, -1, 1, 4, -1, -1, -1, -1] + [-1] * 6
    assert states.labels[0].tolist() == [-1, 0, -1, 1, 2, -1, -1]


def test_second_children_and_grandchildren() -> None:
    # 3 has the children 1 and 2 on its left (2 is nearer), 4 and 6 on its right; 5 is below 6.
    states = States(np.array([7], dtype=np.int32))
    oracle = Oracle(states, *arrays([[3, 3, 7, 3, 6, 3, 0]])[1:])
    while states.steps < 12:  # all but the last two arcs
        states.apply(oracle.transitions())
    positions = states.positions()[0].tolist()
    assert positions[:3] == [7, 3, 0]
    assert positions[12:] == [1, 6, 2, 4, -1, -1]


def test_numbers_of_transitions_are_dense() -> None:
    labels = np.arange(4, dtype=np.int32)
    numbers = [SHIFT, *left_arc(labels), *right_arc(labels)]
    assert sorted(numbers) == list(range(num_transitions(4)))


def test_sentences_that_are_not_sorted_are_refused() -> None:
    for lengths in ([1, 2], [2, 0]):
        with pytest.raises(ValueError, match="sorted by falling length"):
            States(np.array(lengths, dtype=np.int32))
