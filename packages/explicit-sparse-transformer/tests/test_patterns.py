from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_explicit_sparse_transformer.patterns import (
    big_bird,
    block,
    causal_window,
    dilated,
    global_keys,
    out_of_window_attention,
    pattern_attention,
    random_keys,
    window,
)
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.nn import MultiHeadAttention
from separata_shared.nn.cache import GrowingCache
from torch import Tensor

PATTERNS = [window, causal_window, block, dilated, global_keys, random_keys, big_bird]
BUDGETED = [pattern for pattern in PATTERNS if pattern is not global_keys]
lengths = st.integers(1, 12)


def attends(top_k: int) -> list[Attend]:
    return [
        *(pattern_attention(partial(pattern, top_k=top_k)) for pattern in PATTERNS),
        out_of_window_attention(top_k),
        out_of_window_attention(top_k, local=causal_window),
    ]


def inputs(length: int, *, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length, 4)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))  # type: ignore[return-value]


def weights_of(attend: Attend, length: int, **options: object) -> Tensor:
    _, weights = attend(*inputs(length), return_weights=True, **options)  # type: ignore[arg-type]
    return weights


def rows(pattern: Callable[..., Tensor], length: int, **options: int) -> list[list[int]]:
    kept = pattern(torch.ones(length, length, dtype=torch.bool), **options)
    return [row.nonzero().flatten().tolist() for row in kept]


def test_worked_examples() -> None:
    assert rows(window, 6, top_k=3) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]]
    assert rows(window, 6, top_k=4)[3] == [1, 2, 3, 4]
    assert rows(causal_window, 4, top_k=2) == [[0], [0, 1], [1, 2], [2, 3]]
    assert rows(block, 5, top_k=2) == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]
    assert rows(dilated, 9, top_k=3)[4] == [2, 4, 6]
    assert rows(dilated, 9, top_k=4, dilation=3)[6] == [0, 3, 6]
    assert rows(global_keys, 4, top_k=1) == [[0, 1, 2, 3], [0], [0], [0]]
    assert {0, 7, 8, 9, 10} <= set(rows(big_bird, 12, top_k=8)[9])


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(BUDGETED),
    targets=lengths,
    sources=lengths,
    top_k=st.integers(1, 14),
    seed=st.integers(0, 50),
)
def test_budget_holds_and_masked_keys_are_never_kept(
    pattern: Callable[..., Tensor], targets: int, sources: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(2, 1, targets, sources, generator=generator) < 0.7
    kept = pattern(allowed, top_k=top_k)
    assert kept.shape == allowed.shape
    assert not (kept & ~allowed).any()
    assert (kept.sum(dim=-1) <= top_k).all()
    if pattern is random_keys:
        assert torch.equal(kept.sum(dim=-1), allowed.sum(dim=-1).clamp(max=top_k))


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 12), top_k=st.integers(2, 14), causal=st.booleans())
def test_out_of_window_keeps_the_window_and_the_best_outside(
    length: int, top_k: int, causal: bool
) -> None:
    local = causal_window if causal else window
    attend = out_of_window_attention(top_k, local=local)
    query, key, _ = inputs(length)
    weights = weights_of(attend, length, causal=causal)
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    near = local(allowed, top_k=top_k // 2)
    assert (weights > 0)[..., near].all()
    assert ((weights > 0).sum(dim=-1) <= top_k).all()
    outside = (allowed & ~near).expand(weights.shape)
    scores = (query @ key.mT).masked_fill(~outside, -torch.inf)
    selected = (weights > 0) & outside
    count = outside.sum(dim=-1).clamp(max=top_k - top_k // 2)
    assert torch.equal(selected.sum(dim=-1), count)
    worst = scores.masked_fill(~selected, torch.inf).amin(dim=-1)
    best_left = scores.masked_fill(selected, -torch.inf).amax(dim=-1)
    assert (worst >= best_left).all()


def test_with_the_budget_of_all_keys_every_full_pattern_is_dense() -> None:
    expected = dense_attention(*inputs(5))
    for pattern in (block, global_keys, random_keys):
        actual = pattern_attention(partial(pattern, top_k=5))(*inputs(5))
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(out_of_window_attention(10)(*inputs(5)), expected)


def test_out_of_window_differs_from_plain_selection() -> None:
    plain = partial(topk_attention, top_k=4)
    assert not torch.equal(
        weights_of(plain, 12) > 0, weights_of(out_of_window_attention(4), 12) > 0
    )


@pytest.mark.parametrize("number", range(9))
def test_masks_combine_and_an_empty_row_is_zero(number: int) -> None:
    attend = attends(4)[number]
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 6:] = False
    mask[1] = False
    weights = weights_of(attend, 9, mask=mask, causal=True)
    assert weights.isfinite().all()
    assert (weights[1] == 0).all()
    assert (weights[0, ..., 6:] == 0).all()
    assert (weights.triu(1) == 0).all()
    attending = weights[0].sum(dim=-1)
    torch.testing.assert_close(attending, (attending > 0.5).float())


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 8])
def test_step_by_step_decoding_equals_the_whole_sequence(number: int) -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(8, 2, attend=attends(4)[number])
    x = torch.randn(2, 10, 8)
    cache = GrowingCache()
    with torch.no_grad():
        steps = [module(x[:, t : t + 1], causal=True, cache=cache) for t in range(10)]
        torch.testing.assert_close(torch.cat(steps, dim=1), module(x, causal=True))


def test_random_keys_depend_on_the_seed_only() -> None:
    allowed = torch.ones(64, 64, dtype=torch.bool)
    first, again, other = (random_keys(allowed, top_k=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    # Two independent draws of 8 out of 64 share 1 of 8 keys on average.
    assert (first & other).sum() < 0.25 * first.sum()
    # Keys are drawn evenly: the count of each is binomial with mean 8 and deviation 2.65.
    assert first.sum(dim=0).float().std() < 2 * 2.65
    assert first.sum(dim=0).min() > 0


def test_a_budget_without_room_for_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        out_of_window_attention(1)
