import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.data import BatchStream, MappedSequence, TokenBuckets, pad, to_device

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=80)
sides = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=80)
limits = st.integers(30, 200)


@given(lengths=st.one_of(lengths, sides), limit=limits, epoch=st.integers(0, 5))
def test_an_epoch_holds_every_sentence_once_within_the_limit(
    lengths: list[int] | list[tuple[int, int]], limit: int, epoch: int
) -> None:
    table = np.array(lengths).reshape(len(lengths), -1)
    buckets = TokenBuckets(lengths, max_tokens=limit, seed=7)
    for batches in (buckets(epoch), buckets.in_order()):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * table[batch].max() <= limit


@given(lengths=sides, limit=limits, epoch=st.integers(0, 5))
def test_an_epoch_is_a_pure_function_of_seed_and_number(
    lengths: list[tuple[int, int]], limit: int, epoch: int
) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        buckets = TokenBuckets(lengths, max_tokens=limit, seed=seed)
        buckets(9)  # what was asked before does not matter
        return [batch.tolist() for batch in buckets(epoch)]

    assert order(1, epoch) == order(1, epoch)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 200)
    orders = {
        tuple(np.concatenate(TokenBuckets(lengths, max_tokens=100, seed=seed)(epoch)))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_are_as_full_as_sentences_of_equal_length_allow() -> None:
    batches = TokenBuckets([5] * 22, max_tokens=50)(0)
    assert sorted(map(len, batches)) == [2, 10, 10]
    assert sorted(map(len, TokenBuckets([5] * 22, max_tokens=50, max_sentences=8)(0))) == [6, 8, 8]
    in_fours = TokenBuckets([5] * 22, max_tokens=50, multiple=4)(0)
    assert sorted(map(len, in_fours)) == [2, 4, 8, 8]


def test_a_batch_holds_sentences_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    buckets = TokenBuckets(lengths, max_tokens=1000, seed=1)
    padded = sum(len(batch) * lengths[batch].max() for batch in buckets(3))
    assert padded < 1.02 * lengths.sum()


def test_evaluation_begins_with_the_longest_sentence() -> None:
    lengths = [3, 9, 1, 7]
    batches = TokenBuckets(lengths, max_tokens=9, seed=1).in_order()
    assert batches[0].tolist() == [1]
    assert batches[-1].tolist() == [2, 0]


def test_too_long_sentence_is_named() -> None:
    with pytest.raises(ValueError, match=r"sentence 2 has 11 tokens.*max_tokens of a batch, 10"):
        TokenBuckets([3, 11, 12], max_tokens=10)
    with pytest.raises(ValueError, match="no sentences"):
        TokenBuckets([], max_tokens=10)


@given(sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4), world=st.integers(1, 4))
def test_stream_deals_the_batches_of_all_epochs_in_order(sizes: list[int], world: int) -> None:
    def batches(epoch: int) -> list[tuple[int, int]]:
        return [(epoch, index) for index in range(sizes[epoch % 4])]

    expected = [batch for epoch in range(50) for batch in batches(epoch)]
    streams = [BatchStream(batches) for _ in range(world)]
    dealt = []
    for _ in range(3):
        hands = [list(s.take(4 * world, rank=r, size=world)) for r, s in enumerate(streams)]
        dealt += [hand[i] for i in range(4) for hand in hands]
    assert [batch for _, _, batch in dealt] == expected[: 12 * world]
    assert all(batch == (epoch, index) for epoch, index, batch in dealt)
    assert len({(stream.epoch, stream.index) for stream in streams}) == 1
    again = BatchStream(batches, epoch=streams[0].epoch, index=streams[0].index)
    assert next(again.take(1))[2] == expected[12 * world]


def test_empty_epoch_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(ValueError, match="epoch 0 has no batches"):
        BatchStream(lambda epoch: [])


def test_batches_are_made_when_asked_for() -> None:
    made = []

    def make(indices: np.ndarray) -> int:
        made.append(indices)
        return int(indices.sum())

    mapped = MappedSequence(make, [np.array([1, 2]), np.array([3]), np.array([4])])
    assert len(mapped) == 3
    assert made == []
    assert mapped[-1] == 4
    assert list(mapped[:2]) == [3, 3]


@given(st.lists(st.lists(st.integers(2, 9), max_size=8), max_size=6))
def test_padding_keeps_the_sequences(rows: list[list[int]]) -> None:
    padded = pad(rows, 1)
    assert padded.dtype == torch.int64
    assert padded.shape == (len(rows), max(map(len, rows), default=0))
    assert [[n for n in row if n != 1] for row in padded.tolist()] == rows
    assert all(
        row[len(given) :] == [1] * (len(row) - len(given))
        for row, given in zip(padded.tolist(), rows, strict=True)
    )


def test_padding_to_a_given_length() -> None:
    assert pad([[5]], 0, length=3).tolist() == [[5, 0, 0]]
    with pytest.raises(ValueError, match="sequence 1 has 2 tokens, limit 1"):
        pad([[5], [5, 6]], 0, length=1)


def test_whole_batches_move_to_a_device() -> None:
    device = torch.device("meta")
    moved = to_device({"a": [torch.zeros(2), 3], "b": (torch.ones(1),)}, device)
    assert moved["a"][0].device == moved["b"][0].device == device
    assert moved["a"][1] == 3
