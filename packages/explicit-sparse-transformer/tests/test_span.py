import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_explicit_sparse_transformer.selection import official_top_k
from separata_explicit_sparse_transformer.span import (
    AdaptiveSpan,
    SpanAttention,
    SpanLanguageModel,
    build_span_language_model,
    skew,
    unskew,
)
from torch import Tensor


def span_of(
    max_span: int, share: float, *, top_k: int | None = None, ramp: int = 2
) -> AdaptiveSpan:
    return AdaptiveSpan(
        max_span, num_heads=2, ramp=ramp, initial=share, top_k=lambda num_keys: top_k
    ).double()


def language_model(share: float = 1.0, top_k: int | None = 3, span: int = 6) -> SpanLanguageModel:
    torch.manual_seed(0)
    return build_span_language_model(
        11,
        width=8,
        hidden_width=12,
        num_heads=2,
        num_layers=2,
        dropout=0.0,
        span=lambda: span_of(span, share, top_k=top_k),
    ).double()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), span=st.integers(1, 7))
def test_skew_puts_row_i_at_column_i_and_unskew_undoes_it(rows: int, span: int) -> None:
    weights = torch.rand(2, 3, rows, span) + 0.1
    skewed = skew(weights)
    assert skewed.shape == (2, 3, rows, span + rows)
    for row in range(rows):
        assert torch.equal(skewed[..., row, row : row + span], weights[..., row, :])
    torch.testing.assert_close(skewed.sum(-1), weights.sum(-1))
    assert torch.equal(unskew(skewed), weights)


def test_mask_is_a_ramp_before_the_span() -> None:
    # z L = 4 of L = 8 with ramp 2: 1 for the last 5 places, then (R - 1) / R, then 0.
    span = span_of(8, 0.5)
    expected = torch.tensor([0, 0, 0.5, 1, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(span.mask(8).detach()[0, 0], expected)
    torch.testing.assert_close(span.mask(3).detach()[1, 0], expected[-3:])


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0, 1),
    top_k=st.integers(1, 9),
    ramp=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_weights_are_masked_selected_and_renormalised(
    share: float, top_k: int, ramp: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64).softmax(-1)
    span = span_of(8, share, top_k=top_k, ramp=ramp)
    out = span(weights)
    masked = weights * span.mask(8)
    inside = (masked > 0).sum(-1)
    assert torch.equal((out > 0).sum(-1), inside.clamp(max=top_k))
    kept = masked * (out > 0)
    best_left = masked.masked_fill(out > 0, 0).amax(-1)
    assert (masked.masked_fill(out == 0, math.inf).amin(-1) >= best_left).all()
    torch.testing.assert_close(out, kept / (kept.sum(-1, keepdim=True) + 1e-8))


def test_the_span_learns_through_the_ramp_only() -> None:
    weights = torch.full((1, 2, 1, 8), 1 / 8, dtype=torch.float64)
    span = span_of(8, 0.5)
    span(weights)[0, 0, 0, 2].backward()
    assert span.share.grad is not None
    assert span.share.grad[0] > 0
    assert span.share.grad[1] == 0
    assert torch.autograd.gradcheck(
        lambda share: torch.func.functional_call(span, {"share": share}, weights),
        torch.tensor([0.47, 0.61], dtype=torch.float64).view(2, 1, 1).requires_grad_(),
    )


def test_span_loss_is_the_mean_span_and_shares_are_clamped() -> None:
    span = span_of(8, 0.0)
    span.share.data = torch.tensor([-0.25, 0.5]).double().view(2, 1, 1)
    torch.testing.assert_close(span.loss().item(), 8 * 0.125)
    assert (span.longest(), span.average()) == (4 + 2, 1 + 2)
    span.clamp()
    assert span.share.flatten().tolist() == [0.0, 0.5]


def attend_naively(
    module: SpanAttention, x: Tensor, cache: Tensor, positions: Tensor, top_k: int | None
) -> Tensor:
    """The definition, query by query: softmax over the L previous keys, mask, k best, mean."""
    past = torch.cat([cache, x], dim=1)
    span, heads = module.span.max_span, module.num_heads
    width = x.shape[-1] // heads
    rows = []
    for t in range(x.shape[1]):
        keys = past[:, cache.shape[1] + t - span : cache.shape[1] + t]
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            query = module.q_proj(x[:, t])[:, part]
            key, value = module.k_proj(keys)[..., part], module.v_proj(keys)[..., part]
            scores = (key @ query[..., None])[..., 0] + query @ positions
            weights = (scores / math.sqrt(width)).softmax(-1) * module.span.mask(span)[head]
            if top_k is not None:
                kept = weights >= weights.topk(top_k).values[:, -1:]
                weights = weights * kept
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
            outputs.append((weights[:, None] @ value)[:, 0])
        rows.append(module.out_proj(torch.cat(outputs, dim=-1)))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_sequential_attention_is_its_definition(top_k: int | None, share: float) -> None:
    torch.manual_seed(0)
    module = SpanAttention(8, 2, span=span_of(6, share, top_k=top_k)).double()
    x, cache, positions = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 8), (2, 6, 8), (4, 6))
    )
    expected = attend_naively(module, x, cache, positions, top_k)
    torch.testing.assert_close(module(x, cache, positions), expected)


@pytest.mark.parametrize("top_k", [None, 4])
def test_trimming_what_no_head_reaches_changes_nothing(top_k: int | None) -> None:
    torch.manual_seed(0)
    module = SpanAttention(8, 2, span=span_of(200, 0.1, top_k=top_k)).double()
    assert module.span.trimmed() == 128  # 200 - 22 in use, in steps of 64
    assert module.span.cache_length() == 136
    x, cache, positions = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 8), (2, 200, 8), (4, 200))
    )
    expected = attend_naively(module, x, cache, positions, top_k)
    torch.testing.assert_close(module(x, cache, positions), expected, atol=1e-6, rtol=0)


def test_missing_past_counts_as_zeros() -> None:
    torch.manual_seed(0)
    module = SpanAttention(8, 2, span=span_of(6, 1.0)).double()
    x, positions = torch.randn(2, 3, 8).double(), torch.randn(4, 6).double()
    empty, zeros = torch.zeros(2, 0, 8).double(), torch.zeros(2, 6, 8).double()
    torch.testing.assert_close(module(x, empty, positions), module(x, zeros, positions))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_reading_in_blocks_equals_reading_at_once(cuts: list[int]) -> None:
    model = language_model()
    tokens = torch.randint(11, (2, sum(cuts)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, _ = model(tokens, model.start(2))
        caches, parts = model.start(2), []
        for block in tokens.split(cuts, dim=1):
            logits, caches = model(block, caches)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert all(cache.shape[1] == min(6, sum(cuts)) for cache in caches)


def test_scores_do_not_depend_on_the_future() -> None:
    model = language_model()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    with torch.no_grad():
        before, after = (model(x, model.start(1))[0] for x in (tokens, changed))
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_caches_carry_no_gradient() -> None:
    model = language_model()
    tokens = torch.randint(11, (2, 4))
    _, caches = model(tokens, model.start(2))
    assert not any(cache.requires_grad for cache in caches)


def test_a_ratio_of_the_span_may_be_kept() -> None:
    span = AdaptiveSpan(8, num_heads=2, ramp=2, initial=1.0, top_k=partial(official_top_k, 3.0, 2))
    weights = torch.randn(1, 2, 4, 8).softmax(-1)
    assert ((span(weights) > 0).sum(-1) == 3).all()


def test_parameters_of_the_published_size() -> None:
    """Spec, section 2: 12 layers, 512, 2048, 8 heads, span 8192 is a model of about 39M."""
    with torch.device("meta"):
        model = build_span_language_model(
            205,
            width=512,
            hidden_width=2048,
            num_heads=8,
            num_layers=12,
            dropout=0.3,
            span=lambda: AdaptiveSpan(8192, num_heads=8),
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    # A layer: 4 M^2 + 2 M F + F + M, norms 4 M, spans 8; 2 V M + V for the symbols; 64 L positions.
    layer = 4 * 512**2 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512 + 8
    assert count == 12 * layer + 2 * 205 * 512 + 205 + 64 * 8192
    assert round(count / 1e6) in (38, 39)
