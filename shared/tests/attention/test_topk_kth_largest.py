"""The k-th largest number of rows, by networks of comparisons."""

import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.attention.topk import kth_largest as module
from separata_shared.attention.topk.kth_largest import kth_largest
from torch import Tensor


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_network_sorts_every_sequence_of_zeros_and_ones(length: int) -> None:
    """A network of comparisons that sorts these sorts everything (Knuth, zero-one principle)."""
    sequences = torch.tensor(list(itertools.product([0.0, 1.0], repeat=length)))
    places = [place.clone() for place in sequences.T]
    module._exchange(places, module._sorting_network(length))
    assert torch.equal(torch.stack(places, 1), sequences.sort(1, descending=True).values)


def rows(source: int, levels: float, seed: int) -> Tensor:
    """Numbers with ties and infinities, in as many rows as a network takes."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, 6, 50, source, generator=random).mul(levels).round()
    numbers[0, 0, :, source // 2 :] = -torch.inf
    assert numbers[..., 0].numel() >= module.NETWORK_ROWS
    return numbers


@pytest.mark.parametrize("chunk", [250, 1024])
@settings(max_examples=20, deadline=None)
@given(
    source=st.integers(1, 140),
    k=st.integers(1, 140),
    levels=st.sampled_from([2.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_one_k_for_all_rows(chunk: int, source: int, k: int, levels: float, seed: int) -> None:
    numbers = rows(source, levels, seed)
    before = numbers.clone()
    ordered = numbers.sort(dim=-1, descending=True).values
    place = min(k, source) - 1
    with patch.multiple(module, CHUNK_NUMBERS=1, CHUNK_ROWS=chunk):
        assert torch.equal(kth_largest(numbers, k), ordered[..., place : place + 1])
    assert torch.equal(numbers, before)


@settings(max_examples=10, deadline=None)
@given(source=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_row_its_own_k(source: int, seed: int) -> None:
    numbers = rows(source, 2.0, seed)
    k = torch.randint(1, 50, (6, 1, 1), generator=torch.Generator().manual_seed(seed))
    ordered = numbers.sort(dim=-1, descending=True).values
    places = k.clamp(max=source).expand(*numbers.shape[:-1], 1) - 1
    assert torch.equal(kth_largest(numbers, k), ordered.gather(-1, places))


@pytest.mark.slow
def test_network_can_be_compiled() -> None:
    numbers = rows(40, 1e6, 0)
    compiled = torch.compile(kth_largest, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(numbers, 8), kth_largest(numbers, 8))
