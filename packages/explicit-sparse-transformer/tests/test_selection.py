import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_explicit_sparse_transformer.selection import (
    PhaseSwitch,
    attention_with,
    entmax15,
    entmax15_attention,
    joint_heads_topk_softmax,
    linear_top_k,
    masked_softmax,
    official_joint_heads_softmax,
    official_ratio_attention,
    official_top_k,
    selection_before_masking_softmax,
    softmax_topk,
    softmax_topk_softmax,
    sparsemax,
    sparsemax_attention,
    straight_through_topk_softmax,
    topk_softmax,
)
from separata_shared.attention import dense_attention, topk_attention
from torch import Tensor, nn

RULES: list[Any] = [
    partial(topk_softmax, top_k=3),
    partial(straight_through_topk_softmax, top_k=3),
    partial(softmax_topk, top_k=3),
    partial(softmax_topk_softmax, top_k=3),
    partial(joint_heads_topk_softmax, top_k=3),
    sparsemax,
    entmax15,
]
RULE_NAMES = [getattr(rule, "func", rule).__name__ for rule in RULES]
every_rule = pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
seeds = st.integers(0, 10_000)


def scores_of(seed: int, *shape: int) -> Tensor:
    """Scores in float64; two of a row are never equal."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def mask_of(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 2, 7, 8, generator=generator) for _ in range(2))
    return query, key, value


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), top_k=st.integers(1, 11), seed=seeds)
def test_topk_softmax_is_the_dense_softmax_renormalised_on_the_k_best(
    size: int, top_k: int, seed: int
) -> None:
    scores, mask = scores_of(seed, 2, 3, 4, size), mask_of(seed, 2, 1, 4, size)
    weights = topk_softmax(scores, top_k, mask=mask)
    kept = weights > 0
    allowed = mask.expand(scores.shape)
    assert not (kept & ~allowed).any()
    assert torch.equal(kept.sum(-1), allowed.sum(-1).clamp(max=top_k))
    worst = scores.masked_fill(~kept, math.inf).amin(-1)
    best_left = scores.masked_fill(kept | ~allowed, -math.inf).amax(-1)
    assert (worst >= best_left).all()
    dense = masked_softmax(scores, allowed)
    expected = dense * kept / (dense * kept).sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).double())


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 9), seed=seeds)
def test_supports_are_nested_and_scale_row_constants_and_key_order_do_not_matter(
    size: int, seed: int
) -> None:
    scores = scores_of(seed, 2, 4, size)
    supports = [topk_softmax(scores, k) > 0 for k in range(1, size + 1)]
    assert all(not (a & ~b).any() for a, b in pairwise(supports))
    weights = topk_softmax(scores, 2)
    torch.testing.assert_close(topk_softmax(scores + 5, 2), weights)
    assert torch.equal(topk_softmax(3 * scores, 2) > 0, weights > 0)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(topk_softmax(scores[..., order], 2), weights[..., order])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, top_k=st.integers(1, 5))
def test_gradient_is_that_of_a_softmax_on_the_support_and_zero_elsewhere(
    seed: int, top_k: int
) -> None:
    scores = scores_of(seed, 3, 5).requires_grad_()
    upstream = scores_of(seed + 1, 3, 5)
    weights = topk_softmax(scores, top_k)
    (weights * upstream).sum().backward()
    a = weights.detach()
    expected = a * (upstream - (a * upstream).sum(-1, keepdim=True))  # spec: section 1.4
    torch.testing.assert_close(scores.grad, expected)
    assert scores.grad is not None
    assert (scores.grad[a == 0] == 0).all()
    if top_k == 1:
        assert (scores.grad == 0).all()


# The straight-through rule has another function's backward by design; it has its own test.
@pytest.mark.parametrize("rule", RULES[:1] + RULES[2:], ids=RULE_NAMES[:1] + RULE_NAMES[2:])
def test_gradients_agree_with_finite_differences(rule: Any) -> None:
    scores = scores_of(1, 2, 2, 2, 5).requires_grad_()
    mask = torch.tensor([True, True, True, True, False])
    assert torch.autograd.gradcheck(lambda x: rule(x, mask=mask), (scores,))


def test_straight_through_selects_forward_and_passes_the_dense_gradient() -> None:
    scores = scores_of(0, 3, 6).requires_grad_()
    upstream = scores_of(1, 3, 6)
    weights = straight_through_topk_softmax(scores, 2)
    assert torch.equal(weights, topk_softmax(scores, 2))
    (weights * upstream).sum().backward()
    dense = scores.detach().clone().requires_grad_()
    (dense.softmax(-1) * upstream).sum().backward()
    torch.testing.assert_close(scores.grad, dense.grad)


@every_rule
def test_masked_keys_and_empty_rows_get_no_weight_and_no_gradient(rule: Any) -> None:
    scores = scores_of(3, 2, 2, 3, 6).requires_grad_()
    mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    mask[1] = False
    weights = rule(scores, mask=mask)
    assert (weights[~mask.expand(weights.shape)] == 0).all()
    (weights * scores_of(4, 2, 2, 3, 6)).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[~mask.expand(weights.shape)] == 0).all()
    assert (weights[0].sum((0, 2)) > 0.4).all()


@every_rule
def test_infinitely_low_scores_count_as_masked(rule: Any) -> None:
    scores, mask = scores_of(5, 1, 2, 3, 6), torch.tensor([True, False, True, True, False, True])
    expected = rule(scores, mask=mask)
    torch.testing.assert_close(rule(scores.masked_fill(~mask, -math.inf), mask=None), expected)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_normalised_in_single_precision(
    rule: Any, dtype: torch.dtype
) -> None:
    scores = scores_of(6, 1, 2, 3, 6).to(dtype)
    weights = rule(scores, mask=None)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, rule(scores.float(), mask=None).to(dtype))


def test_ties_are_kept_or_the_lowest_index_wins() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    kept = topk_softmax(scores, 2) > 0
    assert kept.tolist() == [True, True, True, False, True]
    exact = topk_softmax(scores, 2, ties="exact") > 0
    assert exact.tolist() == [True, True, False, False, False]


def test_k_may_differ_from_row_to_row() -> None:
    scores = scores_of(7, 2, 3, 4, 6)
    weights = topk_softmax(scores, torch.tensor([[1], [2], [5]]))
    assert ((weights > 0).sum(-1) == torch.tensor([[1], [2], [5]])).all()


def test_selection_after_the_softmax_loses_mass_and_again_makes_flatter() -> None:
    scores = scores_of(8, 2, 2, 3, 9)
    after, again = softmax_topk(scores, 3), softmax_topk_softmax(scores, 3)
    before = topk_softmax(scores, 3)
    assert torch.equal(after > 0, before > 0)
    assert torch.equal(again > 0, before > 0)
    assert (after.sum(-1) < 1).all()
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before)
    torch.testing.assert_close(again.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64))
    assert (again.amax(-1) < before.amax(-1)).all()
    # Probabilities lie in [0, 1], so two of the second weights differ by a factor e at most.
    positive = again.masked_fill(again == 0, math.inf).amin(-1)
    assert (again.amax(-1) / positive <= math.e).all()


def test_selection_before_masking_leaks_where_only_masked_keys_are_selected() -> None:
    """The measured flaw of this order, and the reason why it is a named compatibility mode."""
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False, False]])
    leaked = selection_before_masking_softmax(scores, 2, mask=mask)
    torch.testing.assert_close(leaked, torch.full((1, 4), 0.25))
    torch.testing.assert_close(
        topk_softmax(scores, 2, mask=mask),
        torch.tensor([[0.2689, 0.7311, 0, 0]]),
        atol=1e-4,
        rtol=0,
    )
    free = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(
        selection_before_masking_softmax(scores, 2, mask=free), topk_softmax(scores, 2)
    )


def test_joint_heads_share_one_budget_and_an_unselected_head_is_zero() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0], [0.0, 1.0, 2.0]])[None, :, None]  # (1, 2, 1, 3)
    weights = joint_heads_topk_softmax(scores, 1)  # the 2 largest of 6
    assert (weights > 0).squeeze().tolist() == [[True, True, False], [False] * 3]
    official = official_joint_heads_softmax(scores, 1)
    torch.testing.assert_close(official[:, 0], weights[:, 0])
    torch.testing.assert_close(official[0, 1], torch.full((1, 3), 1 / 3))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, top_k=st.integers(1, 8))
def test_joint_heads_keep_the_best_of_all_heads(seed: int, top_k: int) -> None:
    scores, mask = scores_of(seed, 2, 3, 4, 6), mask_of(seed, 2, 1, 4, 6)
    kept = joint_heads_topk_softmax(scores, top_k, mask=mask) > 0
    allowed = mask.expand(scores.shape)
    count = allowed.sum((1, 3)).clamp(max=3 * min(top_k, 6))
    assert torch.equal(kept.sum((1, 3)), count)
    worst = scores.masked_fill(~kept, math.inf).amin((1, 3))
    best_left = scores.masked_fill(kept | ~allowed, -math.inf).amax((1, 3))
    assert (worst >= best_left).all()


def test_sparsemax_worked_example() -> None:
    # Martins and Astudillo 2016, Eq. 5: of (1, 0.5, -1) the first two stay, threshold 0.25.
    torch.testing.assert_close(
        sparsemax(torch.tensor([1.0, 0.5, -1.0])), torch.tensor([0.75, 0.25, 0.0])
    )


def test_entmax_lies_between_softmax_and_sparsemax() -> None:
    scores = scores_of(9, 50, 8)
    sizes = [
        (rule(scores) > 0).sum() for rule in (partial(topk_softmax, top_k=8), entmax15, sparsemax)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("causal", [False, True])
def test_an_attention_made_of_the_rule_is_the_attention(causal: bool) -> None:
    query, key, value = qkv()
    mask = torch.arange(7) < torch.tensor([7, 5])[:, None, None, None]
    bias = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"mask": mask, "bias": bias, "causal": causal}
    ours = attention_with(partial(topk_softmax, top_k=3))
    for actual, expected in zip(
        ours(query, key, value, return_weights=True, **options),
        topk_attention(query, key, value, top_k=3, return_weights=True, **options),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    dense = attention_with(partial(topk_softmax, top_k=7))
    torch.testing.assert_close(
        dense(query, key, value, **options), dense_attention(query, key, value, **options)
    )


def test_dropout_acts_on_the_weights_and_not_on_those_returned() -> None:
    query, key, value = qkv()
    torch.manual_seed(0)
    output, weights = sparsemax_attention(query, key, value, dropout=0.5, return_weights=True)
    whole, expected = sparsemax_attention(query, key, value, return_weights=True)
    torch.testing.assert_close(weights, expected)
    assert not torch.allclose(output, whole)


@pytest.mark.parametrize(
    ("div", "bound", "keys", "expected"),
    [
        (-8, 0, 100, 8),
        (-8, 0, 5, 5),
        (3, 2, 10, 4),
        (3, 6, 10, 6),
        (3, 20, 10, 10),
        (0, 4, 10, None),
    ],
)
def test_official_rule_for_k(div: float, bound: int, keys: int, expected: int | None) -> None:
    """Cases of the table in the authors' options ``div`` and ``lb``; (3, 2, 10) is a golden."""
    assert official_top_k(div, bound, keys) == expected


def test_official_ratio_counts_padding_and_the_consistent_one_does_not() -> None:
    query, key, value = qkv()
    mask = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    mask[..., 7:] = False
    long_key, long_value = (nn.functional.pad(x, (0, 0, 0, 3)) for x in (key, value))
    official = partial(official_ratio_attention, div=3.0)
    _, short = official(query, key, value, return_weights=True)
    _, long = official(query, long_key, long_value, mask=mask, return_weights=True)
    assert ((short > 0).sum(-1) == 3).all()
    assert ((long > 0).sum(-1) == 4).all()
    consistent = partial(topk_attention, ratio=3.0)
    torch.testing.assert_close(
        consistent(query, long_key, long_value, mask=mask), consistent(query, key, value)
    )
    torch.testing.assert_close(
        official_ratio_attention(query, key, value, div=0), dense_attention(query, key, value)
    )


def test_phase_switch_follows_the_mode() -> None:
    inputs = qkv()
    switch = PhaseSwitch(train=entmax15_attention, predict=dense_attention)
    torch.testing.assert_close(switch(*inputs), entmax15_attention(*inputs))
    switch.eval()
    torch.testing.assert_close(switch(*inputs), dense_attention(*inputs))


def test_k_schedule_is_linear_and_ends() -> None:
    schedule = linear_top_k(32, 8, 6)
    assert [schedule(step) for step in range(9)] == [32, 28, 24, 20, 16, 12, 8, 8, 8]
    assert [linear_top_k(2, 4, 2)(step) for step in (0, 1, 2)] == [2, 3, 4]
    with pytest.raises(ValueError, match="at least 1"):
        linear_top_k(0, 8, 10)
