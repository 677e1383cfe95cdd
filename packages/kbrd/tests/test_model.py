"""User vector, scores, loss and baselines: what the specification promises of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_kbrd.edges import EdgeIndex
from separata_kbrd.model import (
    AutoRec,
    Recommender,
    RelationalGraphLayer,
    UserVector,
    initialise_uniform,
    recommendation_loss,
)
from separata_kbrd.pairs import RecommenderBatch
from separata_kbrd.recommendation import (
    autorec_step,
    multi_hot,
    popularity,
    rank_instances,
    recalls,
    recommendation_step,
    repetition,
    report,
)
from torch import Tensor

N, R, B, d = 20, 3, 2, 6
examples = settings(max_examples=30, deadline=None, derandomize=True)


def pooling(width: int = d) -> UserVector:
    torch.manual_seed(0)
    return UserVector(width).double()


def vectors(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def recommender() -> Recommender:
    torch.manual_seed(0)
    ring = torch.arange(N)
    columns = [torch.stack([ring, (ring + r) % N, ring * 0 + r], dim=1) for r in range(R)]
    edges = EdgeIndex(torch.cat(columns), num_nodes=N, num_relations=R)
    layer = RelationalGraphLayer(edges, width=d, num_bases=B, initialise=initialise_uniform)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return Recommender(layer).double()


def batch(
    contexts: list[list[int]], instances: list[tuple[int, int]], turns: list[int] | None = None
) -> RecommenderBatch:
    """Turns whose mentioned nodes are the items of the context; instances are (row, target)."""
    longest = max(map(len, contexts))
    nodes = torch.tensor([c + [0] * (longest - len(c)) for c in contexts], dtype=torch.int64)
    lengths = torch.tensor([len(c) for c in contexts])
    mask = torch.arange(longest) < lengths[:, None]
    row, target = (torch.tensor(column) for column in zip(*instances, strict=True))
    turn = torch.tensor(turns or [1] * len(contexts))[row]
    context = nodes.masked_fill(~mask, -1)
    return RecommenderBatch(nodes, mask, row, target, turn, context)


class TestUserVector:
    """Acceptance check 4 of the specification."""

    @examples
    @given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), extra=st.integers(0, 3))
    def test_weights_sum_to_one_and_padding_changes_nothing(
        self, lengths: list[int], extra: int
    ) -> None:
        longest = max(lengths) + extra
        h = vectors(len(lengths), longest, d)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        users, weights = pooling()(h, mask)
        sums = weights.sum(dim=1)
        assert torch.allclose(sums, torch.tensor([float(n > 0) for n in lengths]).double())
        assert not weights[~mask].any()
        for user, length, row in zip(users, lengths, h, strict=True):
            alone, _ = pooling()(row[None, :length], torch.ones(1, length, dtype=torch.bool))
            assert torch.allclose(user, alone[0], rtol=0, atol=1e-12)

    def test_the_order_of_mentions_is_irrelevant(self) -> None:
        h, mask = vectors(1, 5, d), torch.ones(1, 5, dtype=torch.bool)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert torch.allclose(pooling()(h, mask)[0], pooling()(h[:, order], mask)[0], atol=1e-12)

    def test_one_mention_is_its_own_vector_however_often_it_is_listed(self) -> None:
        h = vectors(1, 1, d)
        for copies in (1, 2, 7):
            mask = torch.ones(1, copies, dtype=torch.bool)
            user, _ = pooling()(h.expand(1, copies, d), mask)
            assert torch.allclose(user, h[:, 0], atol=1e-12)

    def test_a_repeated_mention_weighs_more(self) -> None:
        h = vectors(1, 2, d)
        mask = torch.ones(1, 3, dtype=torch.bool)
        _, once = pooling()(h, mask[:, :2])
        _, twice = pooling()(torch.cat([h[:, :1], h], dim=1), mask)
        odds = 2 * once[0, 0] / once[0, 1]
        assert torch.allclose((twice[0, 0] + twice[0, 1]) / twice[0, 2], odds)

    def test_without_mentions_it_is_exactly_zero_with_a_finite_gradient(self) -> None:
        layer, h = pooling(), vectors(2, 3, d).requires_grad_()
        users, _ = layer(h, torch.tensor([[False] * 3, [True] * 3]))
        assert not users[0].any()
        users.square().sum().backward()
        assert not h.grad[0].any()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

    def test_nobody_mentions_anything(self) -> None:
        users, weights = pooling()(vectors(3, 0, d), torch.zeros(3, 0, dtype=torch.bool))
        assert users.shape == (3, d)
        assert not users.any()
        assert weights.shape == (3, 0)


class TestScores:
    """Acceptance checks 5 and 7."""

    def test_the_loss_of_equal_scores_is_the_logarithm_of_the_nodes(self) -> None:
        loss = recommendation_loss(
            torch.full((3, N), 2.5), torch.tensor([0, 2]), torch.tensor([4, 9])
        )
        assert loss.item() / 2 == pytest.approx(math.log(N), rel=1e-6)

    def test_an_unused_node_gets_its_gradient_through_the_softmax(self) -> None:
        model = recommender()
        one = batch([[3, 5]], [(0, 7)])
        scores = model(one.nodes, one.mask)
        recommendation_loss(scores, one.row, one.target).backward()
        wanted = scores.softmax(dim=1)[0].detach()
        wanted[7] -= 1
        assert torch.allclose(model.output_bias.grad, wanted, atol=1e-12)

    def test_instances_of_one_turn_share_its_scores(self) -> None:
        model = recommender()
        together = recommendation_step(model, batch([[3, 5], [1]], [(0, 7), (0, 2), (1, 9)]))
        apart = [
            recommendation_step(model, batch([context], [(0, target)]))
            for context, target in (([3, 5], 7), ([3, 5], 2), ([1], 9))
        ]
        assert int(together.count) == 3
        assert together.total.item() == pytest.approx(sum(a.total.item() for a in apart), rel=1e-6)

    def test_cached_vectors_give_the_scores_of_recomputed_ones(self) -> None:
        model = recommender()
        frozen = model.frozen()
        one = batch([[3, 5], [], [1]], [(0, 7)])
        found, wanted = frozen(one.nodes, one.mask), model(one.nodes, one.mask)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
        items = torch.tensor([9, 2, 4])
        user, _ = frozen.users(one.nodes, one.mask)
        assert torch.allclose(frozen.scores(user, items), wanted[:, items], atol=1e-12)

    def test_frozen_tensors_are_not_trained_and_do_not_follow_the_model(self) -> None:
        model = recommender()
        frozen = model.frozen()
        before = frozen.H.clone()
        assert not [p for p in frozen.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert torch.equal(frozen.H, before)
        assert not torch.equal(frozen.user.a, model.user.a)

    def test_a_model_without_mentions_still_recommends(self) -> None:
        model = recommender()
        scores = model(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool))
        assert torch.equal(scores[0], model.output_bias)


class TestRanks:
    """Acceptance checks 5 and 9."""

    def test_a_node_that_is_no_item_does_not_count(self) -> None:
        scores = torch.zeros(1, N)
        scores[0, 0] = 100.0  # no item
        scores[0, 7] = 1.0
        items = torch.tensor([3, 7, 9])
        ranked, _ = rank_instances(lambda _: scores, [batch([[3]], [(0, 7)])], items)
        assert ranked.rank.tolist() == [1]

    def test_equal_scores_gain_nothing(self) -> None:
        items = torch.arange(N)
        ranked, loss = rank_instances(lambda _: torch.zeros(1, N), [batch([[3]], [(0, 7)])], items)
        assert ranked.rank.tolist() == [N]
        assert loss == pytest.approx(math.log(N), rel=1e-6)

    def test_a_target_that_is_no_item_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a target is not among the items"):
            rank_instances(
                lambda _: torch.zeros(1, N), [batch([[3]], [(0, 7)])], torch.tensor([1, 2])
            )

    def test_nothing_to_rank_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nothing to rank"):
            rank_instances(lambda _: torch.zeros(1, N), [], torch.arange(N))

    @examples
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
    def test_recall_grows_with_k(self, ranks: list[int]) -> None:
        found = recalls(torch.tensor(ranks, dtype=torch.float64), {})["all"]
        values = [found[f"recall@{k}"]["value"] for k in (1, 10, 50)]
        assert values == sorted(values)
        assert values[1] == pytest.approx(100 * sum(rank <= 10 for rank in ranks) / len(ranks))

    def test_recall_at_the_number_of_items_is_all(self) -> None:
        items = torch.arange(N)  # fewer than 50
        scores = vectors(3, N)
        one = batch([[3], [4], [5]], [(0, 7), (1, 8), (2, 9)])
        ranked, _ = rank_instances(lambda _: scores, [one], items)
        assert recalls(ranked.rank, {})["all"]["recall@50"]["value"] == 100.0

    def test_the_report_splits_by_turn_and_context_and_finds_what_is_new(self) -> None:
        one = batch([[7, 3], [4], []], [(0, 7), (0, 8), (1, 9), (2, 2)], turns=[3, 2, 1])
        scores = torch.zeros(3, N)
        scores[0, 8] = scores[1, 9] = 1.0
        ranked, _ = rank_instances(lambda _: scores, [one], torch.arange(N))
        found = report(ranked)
        assert found["all"]["recall@1"] == {
            "value": 50.0, "unit": "percent", "signature": "recall@1", "n": 4,
        }  # fmt: skip
        assert {turn: part["recall@1"]["value"] for turn, part in found["by_turn"].items()} == {
            "1": 0.0,
            "2": 100.0,
            "3": 50.0,
        }
        assert {n: part["recall@1"]["n"] for n, part in found["by_context"].items()} == {
            "0": 1,
            "1": 1,
            "2": 2,
        }
        assert found["new"]["recall@1"]["n"] == 3  # film 7 was mentioned before


class TestBaselines:
    def test_repetition_recommends_the_latest_first_and_nothing_else(self) -> None:
        one = batch([[7, 3, 7, 5], []], [(0, 3), (1, 2)])
        scores = repetition(N)(one)
        order = scores[0].argsort(descending=True)[:3].tolist()
        assert order == [5, 7, 3]
        assert scores[0].count_nonzero() == 3
        assert not scores[1].any()

    def test_popularity_counts_the_targets_of_training(self) -> None:
        scorer = popularity([torch.tensor([4, 4, 2]), torch.tensor([4])], N)
        scores = scorer(batch([[1], [2]], [(0, 4)]))
        assert scores.shape == (2, N)
        assert scores[1].argmax() == 4
        assert scores[0, [4, 2, 1]].tolist() == [3.0, 1.0, 0.0]

    def test_the_autoencoder_sees_each_item_of_the_context_once(self) -> None:
        x = multi_hot(torch.tensor([[3, 3, 5], [0, -1, -1], [-1, -1, -1]]), 6)
        assert x.tolist() == [[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [0] * 6]

    def test_the_autoencoder_trains_on_instances(self) -> None:
        torch.manual_seed(0)
        model = AutoRec(N, width=4)
        one = batch([[3, 5], [1]], [(0, 7), (1, 9)])
        loss = autorec_step(model, one)
        scores = model(multi_hot(one.context, N))
        assert loss.total.item() == pytest.approx(
            -scores.log_softmax(1)[[0, 1], [7, 9]].sum().item(), rel=1e-5
        )
        assert int(loss.count) == 2
