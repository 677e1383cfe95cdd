import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.nn.cache import FixedCache, GrowingCache
from torch import Tensor


def project(source: Tensor) -> tuple[Tensor, Tensor]:
    """Two heads of the source itself as keys, their negatives as values."""
    keys = source.unflatten(-1, (2, -1)).transpose(1, 2)
    return keys, -keys


pieces = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 10**6), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


@given(pieces)
def test_growing_cache_equals_concatenation_and_selection(
    pieces: list[tuple[int, list[int]]],
) -> None:
    cache, rows = GrowingCache(), 3
    expected = torch.empty(rows, 0, 4)
    for length, picks in pieces:
        new = torch.randn(rows, length, 4)
        expected = torch.cat((expected, new), dim=1)
        keys, values = cache.read(new, project)
        assert cache.length == expected.size(1)
        assert torch.equal(keys, project(expected)[0])
        assert torch.equal(values, project(expected)[1])
        index = torch.tensor([pick % rows for pick in picks])
        cache.reorder(index)
        expected, rows = expected[index], len(picks)


def test_growing_cache_writes_in_place() -> None:
    cache = GrowingCache()
    addresses = set()
    for _ in range(200):
        keys, _ = cache.read(torch.randn(2, 1, 4), project)
        addresses.add(keys.data_ptr())
    # 32 positions at first, then twice what is needed: 32, 66, 134, 270.
    assert len(addresses) == 4


def test_fixed_cache_projects_once_and_drops_sentences() -> None:
    cache, calls = FixedCache(), []

    def counting(source: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return project(source)

    source = torch.randn(3, 5, 4)
    for _ in range(3):
        keys, _ = cache.read(source, counting)
    assert len(calls) == 1
    assert keys.is_contiguous()  # project gives a view; products would copy it at every step
    cache.keep(torch.tensor([0, 2]))
    kept, _ = cache.read(source, counting)
    assert torch.equal(kept, keys[[0, 2]])
    assert len(calls) == 1
