import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.metrics import ranks, recall_at_k, retrieval_recall

# Two images with two captions each. Image 0 ranks captions 2, 0, 1, 3: its best own caption is
# second. Image 1 ranks captions 3 first. Captions 0, 1 and 3 find their image first, caption 2 not.
SCORES = torch.tensor([[0.8, 0.7, 0.9, 0.1], [0.2, 0.3, 0.6, 0.9]])
RELEVANT = torch.tensor([[True, True, False, False], [False, False, True, True]])


def test_worked_example_in_both_directions() -> None:
    scores = retrieval_recall(SCORES, RELEVANT, ks=(1, 2))
    values = {name: score.value for name, score in scores.items()}
    assert values == {
        "caption_recall@1": 50,
        "caption_recall@2": 100,
        "image_recall@1": 75,
        "image_recall@2": 100,
        "recall_sum": 325,
    }
    assert scores["caption_recall@1"].n == 2
    assert scores["image_recall@1"].n == 4


def test_ties_with_irrelevant_items_count_against_the_model() -> None:
    scores = retrieval_recall(torch.zeros(2, 4), RELEVANT, ks=(1, 2))
    assert all(score.value == 0 for name, score in scores.items() if name.endswith("@1"))


def test_relevant_items_do_not_push_each_other_down() -> None:
    equal = torch.where(RELEVANT, 1.0, 0.0)
    assert retrieval_recall(equal, RELEVANT, ks=(1,))["recall_sum"].value == 200


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_one_relevant_item_is_ordinary_ranking(size: int, seed: int) -> None:
    # Small integers, so that ties occur.
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(5, (size, size), generator=random).double()
    found = retrieval_recall(scores, torch.eye(size, dtype=torch.bool), ks=(1, 3))
    for k in (1, 3):
        expected = recall_at_k(ranks(scores, torch.arange(size)), k)
        assert found[f"caption_recall@{k}"].value == pytest.approx(expected.value)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        retrieval_recall(SCORES, RELEVANT[:, :3])
    with pytest.raises(ValueError, match="boolean"):
        retrieval_recall(SCORES, RELEVANT.int())
    with pytest.raises(ValueError, match="nothing to score"):
        retrieval_recall(SCORES[:0], RELEVANT[:0])
    with pytest.raises(ValueError, match="nothing to score"):
        retrieval_recall(SCORES, RELEVANT, ks=())
    with pytest.raises(ValueError, match="query 1 has no relevant"):
        retrieval_recall(SCORES, RELEVANT & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="NaN"):
        retrieval_recall(SCORES * torch.nan, RELEVANT)
