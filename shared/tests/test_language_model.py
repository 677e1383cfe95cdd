import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.language_model import Blocks, Memory, reading_blocks, training_blocks


def test_streams_are_contiguous_and_every_block_follows_its_predecessor() -> None:
    symbols = np.arange(103)
    blocks = Blocks(symbols, streams=4, block=5, parts=2)
    assert len(blocks) == 2 * ((103 // 4 - 1) // 5)
    first, second, third = blocks[0], blocks[1], blocks[2]
    assert first.tokens.tolist() == [[0, 1, 2, 3, 4], [25, 26, 27, 28, 29]]
    assert first.targets.tolist() == [[1, 2, 3, 4, 5], [26, 27, 28, 29, 30]]
    assert second.tokens[:, 0].tolist() == [50, 75]
    assert third.tokens[:, 0].tolist() == [5, 30]
    assert [b.part for b in (first, second, third)] == [0, 1, 0]
    assert [b.is_first for b in (first, second, third)] == [True, True, False]


def test_epochs_are_cut_at_other_places_and_are_functions_of_the_seed() -> None:
    symbols = np.arange(1000)
    batches = training_blocks(symbols, streams=4, block=16, seed=1)
    starts = [int(batches(epoch)[0].tokens[0, 0]) for epoch in range(6)]
    assert starts[0] == 0
    assert len(set(starts)) > 3
    again = training_blocks(symbols, streams=4, block=16, seed=1)
    assert starts == [int(again(epoch)[0].tokens[0, 0]) for epoch in range(6)]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 200), streams=st.integers(1, 6), block=st.integers(1, 20))
def test_scoring_reads_every_character_once(size: int, streams: int, block: int) -> None:
    symbols = np.arange(size)
    seen: list[int] = []
    for part in reading_blocks(symbols, streams, block):
        real = part.targets >= 0
        seen += part.targets[real].tolist()
        assert torch.equal(part.tokens[real] + 1, part.targets[real])
    assert sorted(seen) == list(range(1, size))


def test_memory_survives_a_checkpoint() -> None:
    memory, other = Memory((2, 4, 24, 16)), Memory((2, 4, 24, 16))
    caches = [torch.randn(4, length, 16) for length in (24, 10)]
    memory.keep(0, caches)
    other.load_state_dict(memory.state_dict())
    found = other.recall(0)
    assert found is not None
    assert torch.equal(found[0], caches[0])
    assert torch.equal(found[1][:, -10:], caches[1])
    assert (found[1][:, :-10] == 0).all()


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        Blocks(np.arange(20), streams=4, block=5)
    with pytest.raises(ValueError, match="a text of 1 characters has none to predict"):
        next(reading_blocks(np.arange(1), 2, 16))


def test_a_memory_that_is_not_full_comes_back_as_long_as_it_was() -> None:
    memory, other = Memory((2, 4, 24, 16)), Memory((2, 4, 24, 16))
    other.load_state_dict(memory.state_dict())
    assert [cache.shape for cache in other.recall(0) or []] == [(4, 0, 16)] * 2
    memory.keep(0, [torch.randn(4, 10, 16)] * 2)
    other.load_state_dict(memory.state_dict())
    assert [cache.shape for cache in other.recall(0) or []] == [(4, 10, 16)] * 2
