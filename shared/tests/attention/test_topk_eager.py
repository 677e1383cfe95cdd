"""What is particular to the eager implementation: its sorting network."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.attention.topk import eager


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_network_sorts_every_sequence_of_zeros_and_ones(length: int) -> None:
    """A network of comparisons that sorts these sorts everything (Knuth, zero-one principle)."""
    sequences = torch.tensor(list(itertools.product([0.0, 1.0], repeat=length)))
    places = list(sequences.T)
    eager._exchange(places, eager._sorting_network(length))
    assert torch.equal(torch.stack(places, 1), sequences.sort(1, descending=True).values)


@settings(max_examples=40, deadline=None)
@given(
    source=st.integers(1, 140),
    count=st.integers(1, 40),
    levels=st.sampled_from([2.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_largest_scores_of_rows(source: int, count: int, levels: float, seed: int) -> None:
    count = min(count, source)
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 50, source, generator=random).mul(levels).round()  # with ties
    scores[0, 0, :, source // 2 :] = -torch.inf
    assert scores[..., 0].numel() >= eager.NETWORK_ROWS
    found = torch.stack(eager._descending(scores, count), dim=-1)
    assert torch.equal(found, scores.topk(count, dim=-1).values)
