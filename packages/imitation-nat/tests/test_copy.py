"""Soft, uniform and interpolated copies of the source (specification, acceptance check 4)."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.length import length_mask
from separata_imitation_nat.source_copy import (
    SoftCopy,
    UniformCopy,
    ZeroCopy,
    interpolation,
    soft_absolute,
    soft_relative,
    uniform_index,
)
from torch import Tensor
from torch.testing import assert_close

properties = settings(deadline=None, max_examples=25)
KINDS = [soft_absolute, soft_relative, interpolation]


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Masks (N, S) and (N, T) of sentences of any length from 1, padded on the right."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    sources, targets = (torch.tensor(lengths) for lengths in zip(*pairs, strict=True))
    sizes = [int(lengths.max()) + draw(st.integers(0, 2)) for lengths in (sources, targets)]
    return length_mask(sources, sizes[0]), length_mask(targets, sizes[1])


scales = st.floats(1e-30, 1e30).map(torch.tensor)


@pytest.mark.parametrize("kind", KINDS)
@properties
@given(pair=mask_pairs(), scale=scales)
def test_rows_sum_to_one_and_padding_weighs_nothing_for_any_scale(kind, pair, scale) -> None:
    source, target = pair
    weights = kind(source, target, scale)
    assert weights.shape == (*target.shape, source.size(1))
    assert_close(weights.sum(dim=-1), torch.ones_like(target, dtype=torch.float32))
    padding = ~source[:, None, :].expand_as(weights)
    assert torch.equal(weights[padding], torch.zeros(int(padding.sum())))


@properties
@given(pair=mask_pairs(), tau=st.floats(0.05, 50.0).map(torch.tensor))
def test_the_absolute_copy_peaks_at_its_own_position(pair, tau) -> None:
    source, target = pair
    best = soft_absolute(source, target, tau).argmax(dim=-1)
    last = source.sum(dim=1, keepdim=True) - 1
    assert torch.equal(best, torch.arange(target.size(1)).minimum(last))


@properties
@given(pair=mask_pairs())
def test_a_small_tau_copies_and_a_large_tau_averages(pair) -> None:
    source, target = pair
    states = torch.randn(*source.shape, 3)
    copied = SoftCopy(soft_absolute, start=1e-3)(states, source, target)
    shared = min(source.size(1), target.size(1))
    both = source[:, :shared] & target[:, :shared]
    assert_close(copied[:, :shared][both], states[:, :shared][both])
    averaged = SoftCopy(soft_absolute, start=1e9)(states, source, target)
    mean = (states * source[..., None]).sum(dim=1) / source.sum(dim=1, keepdim=True)
    assert_close(averaged, mean[:, None].expand_as(averaged))


def test_the_absolute_copy_follows_the_formula() -> None:
    # S = 3, j = 1, tau = 2: weights proportional to exp(-1/2), 1, exp(-1/2).
    weights = soft_absolute(
        torch.ones(1, 3, dtype=bool), torch.ones(1, 2, dtype=bool), torch.tensor(2.0)
    )
    near = torch.tensor(-0.5).exp()
    expected = torch.stack([near, torch.tensor(1.0), near]) / (1 + 2 * near)
    assert_close(weights[0, 1], expected)


def test_a_long_target_reads_the_tail_alone_by_absolute_and_all_by_relative_position() -> None:
    # The flaw that `soft_relative` repairs: T much longer than S.
    source, target = torch.ones(1, 4, dtype=bool), torch.ones(1, 40, dtype=bool)
    tail = soft_absolute(source, target, torch.tensor(1.0))[0, 4:]
    assert_close(tail, tail[:1].expand_as(tail))
    best = soft_relative(source, target, torch.tensor(20.0))[0].argmax(dim=-1)
    # Source i is nearest to j / 40 between (i - 1/2) / 4 and (i + 1/2) / 4.
    assert best.bincount().tolist() in ([6, 10, 10, 14], [5, 10, 10, 15])


@pytest.mark.parametrize("kind", [soft_absolute, soft_relative])
def test_gradient_reaches_tau_and_the_states(kind) -> None:
    source, target = length_mask(torch.tensor([4, 2]), 4), length_mask(torch.tensor([3, 5]), 5)
    states = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    copy = SoftCopy(kind, start=1.5)
    copy(states, source, target).square().sum().backward()
    assert copy.log_scale.grad is not None
    assert copy.log_scale.grad.abs() > 0
    assert states.grad is not None
    real = states.grad.abs().sum(dim=-1) > 0
    assert torch.equal(real, source)


@properties
@given(source_length=st.integers(1, 200), target_length=st.integers(1, 200))
def test_the_uniform_index_is_the_exact_quotient_rounded_half_to_even(
    source_length, target_length
) -> None:
    source = length_mask(torch.tensor([source_length]), source_length + 1)
    target = length_mask(torch.tensor([target_length]), target_length + 1)
    index = uniform_index(source, target)[0]
    step = Fraction(source_length - 1, max(target_length - 1, 1))
    assert index[:-1].tolist() == [round(j * step) for j in range(target_length)]
    assert index[-1] == 0


def test_a_target_of_one_token_copies_the_first_source_position() -> None:
    mask = torch.ones(1, 1, dtype=bool)
    assert uniform_index(torch.ones(1, 7, dtype=bool), mask).tolist() == [[0]]


@pytest.mark.parametrize(
    "copy", [SoftCopy(soft_absolute), SoftCopy(soft_relative), UniformCopy(), ZeroCopy()]
)
@properties
@given(pair=mask_pairs(), seed=st.integers(0, 999))
def test_candidates_of_a_sentence_copy_as_if_each_had_its_own_source(copy, pair, seed) -> None:
    source, target = pair
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(*source.shape, 3, generator=random)
    # Two candidates of each sentence: the second has the lengths of the next sentence.
    candidates = torch.stack([target, target.roll(1, dims=0)], dim=1).flatten(0, 1)
    found = copy(states, source, candidates)
    alone = copy(states.repeat_interleave(2, dim=0), source.repeat_interleave(2, dim=0), candidates)
    assert_close(found, alone)
    more = torch.nn.functional.pad
    padded = copy(
        more(states, (0, 0, 0, 2), value=9.0), more(source, (0, 2)), more(candidates, (0, 1))
    )
    assert_close(padded[:, :-1][candidates], found[candidates])
