import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.metrics import distinct_n


def test_worked_example() -> None:
    sentences = [["a", "b", "a"], ["a", "b"]]
    assert distinct_n(sentences, 1).value == 2 / 5
    # ab, ba, ab: none of them crosses from the first sentence to the second
    score = distinct_n(sentences, 2)
    assert (score.value, score.n) == (2 / 3, 3)
    assert distinct_n(sentences, 3).value == 1


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2), min_size=1), st.integers(1, 2))
def test_saying_everything_twice_halves_it(sentences: list[list[str]], n: int) -> None:
    once, twice = distinct_n(sentences, n), distinct_n(sentences * 2, n)
    assert twice.value == pytest.approx(once.value / 2)


@pytest.mark.parametrize(("sentences", "n"), [([], 1), ([["a"]], 2), ([["a"]], 0)])
def test_nothing_to_count_is_refused(sentences: list[list[str]], n: int) -> None:
    with pytest.raises(ValueError, match="distinct-"):
        distinct_n(sentences, n)
