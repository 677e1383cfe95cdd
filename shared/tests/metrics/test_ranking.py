import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.metrics import mean_reciprocal_rank, ranks, recall_at_k
from separata_shared.metrics.ranking import Ties

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))


@given(SIZES)
def test_counting_equals_sorting_without_ties(sizes: tuple[int, int, int]) -> None:
    queries, candidates, seed = sizes
    random = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(candidates, generator=random) for _ in range(queries)])
    targets = torch.randint(candidates, (queries,), generator=random)
    order = scores.argsort(dim=1, descending=True)
    expected = (order == targets[:, None]).int().argmax(dim=1) + 1
    for ties in ("worst", "best", "mean"):
        assert torch.equal(ranks(scores.float(), targets, ties=ties), expected.double())


@pytest.mark.parametrize(("ties", "expected"), [("worst", 4), ("best", 2), ("mean", 3)])
def test_ties_are_counted_as_said(ties: Ties, expected: float) -> None:
    scores = torch.tensor([[5.0, 3.0, 3.0, 1.0, 3.0]])
    assert ranks(scores, torch.tensor([2]), ties=ties).item() == expected


def test_a_constant_model_gains_nothing_from_ties() -> None:
    assert recall_at_k(ranks(torch.zeros(7, 10), torch.zeros(7, dtype=torch.long)), 9).value == 0


def test_excluded_candidates_do_not_count() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 2.0]])
    assert ranks(scores, torch.tensor([1])).item() == 2


def test_recall_and_reciprocal_rank_of_a_worked_example() -> None:
    found = torch.tensor([1.0, 2.0, 4.0, 10.0])
    assert [recall_at_k(found, k).value for k in (1, 2, 5, 10)] == [25, 50, 75, 100]
    score = mean_reciprocal_rank(found)
    assert score.value == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 10) / 4)
    assert score.n == 4


def test_wrong_use_is_refused() -> None:
    scores, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="are needed"):
        ranks(scores, targets[:1])
    with pytest.raises(ValueError, match="outside the 3 candidates"):
        ranks(scores, targets + 3)
    with pytest.raises(ValueError, match="NaN"):
        ranks(scores.fill_(torch.nan), targets)
    with pytest.raises(ValueError, match="'first' is none of"):
        ranks(torch.zeros(2, 3), targets, ties="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to score"):
        recall_at_k(torch.zeros(0), 1)
    with pytest.raises(ValueError, match="nothing to score"):
        mean_reciprocal_rank(torch.zeros(0))
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(torch.ones(1), 0)
    with pytest.raises(ValueError, match="begin at 1"):
        recall_at_k(torch.zeros(1), 1)
