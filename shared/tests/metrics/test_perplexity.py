import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.metrics import bits_per_character, perplexity

SUMS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=8)


@given(st.integers(2, 1000), st.lists(st.integers(1, 50), min_size=1))
def test_a_uniform_guess_over_v_types_has_perplexity_v(types: int, counts: list[int]) -> None:
    score = perplexity([(count * math.log(types), count) for count in counts])
    assert score.value == pytest.approx(types)
    assert score.n == sum(counts)


@given(SUMS)
def test_the_cut_into_batches_does_not_matter(sums: list[tuple[float, int]]) -> None:
    whole = [(math.fsum(total for total, _ in sums), sum(count for _, count in sums))]
    assert perplexity(sums).value == pytest.approx(perplexity(whole).value)


def test_tokens_weigh_the_same_in_batches_of_different_size() -> None:
    # One token of 0 nats and three of ln 16 in all: exp(ln 16 / 4) = 2, not a mean over batches.
    assert perplexity([(0.0, 1), (math.log(16), 3)]).value == pytest.approx(2)


@given(SUMS)
def test_bits_are_the_logarithm_of_perplexity(sums: list[tuple[float, int]]) -> None:
    bits = bits_per_character(sums)
    assert 2**bits.value == pytest.approx(perplexity(sums).value)
    assert bits.unit == "bits per character"


def test_a_coin_costs_one_bit() -> None:
    assert bits_per_character([(8 * math.log(2), 8)]).value == pytest.approx(1)


def test_a_huge_loss_is_infinite_perplexity() -> None:
    assert perplexity([(1e6, 1)]).value == math.inf


@pytest.mark.parametrize("sums", [[], [(0.0, 0)], [(math.nan, 3)]])
def test_nothing_and_nan_are_refused(sums: list[tuple[float, int]]) -> None:
    for metric in (perplexity, bits_per_character):
        with pytest.raises(ValueError, match=r"nothing to score|not a number"):
            metric(sums)
