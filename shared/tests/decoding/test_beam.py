from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.decoding import (
    Hypothesis,
    beam_search,
    gnmt_penalty,
    greedy_search,
    power_penalty,
)
from torch import Tensor
from torch.testing import assert_close

PAD, EOS = 1, 2
WORDS = (0, 3, 4, 5)  # all tokens of the toy model but padding and EOS


def search(model, sentences: list[int], **options) -> list[list[Hypothesis]]:
    options = {"beam_size": 3, "max_lengths": [6] * len(sentences), **options}
    first = torch.full((len(sentences),), EOS)
    return beam_search(
        model.step, model.start(sentences), first, eos_index=EOS, padding_index=PAD, **options
    )


def tokens(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[each.tokens.tolist() for each in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("penalty", [power_penalty(1.0), power_penalty(0.0), gnmt_penalty(0.6)])
@pytest.mark.parametrize("min_length", [0, 1, 2])
def test_wide_beam_equals_exhaustive_search(make_model, penalty, min_length: int) -> None:
    model, longest = make_model(), 3
    every = [
        [*words, EOS]
        for length in range(min_length, longest + 1)
        for words in product(WORDS, repeat=length)
    ]
    for sentence in (0, 5):
        expected = [(each, sum(model.score(sentence, each)) / penalty(len(each))) for each in every]
        expected.sort(key=lambda pair: -pair[1])
        # At the longest length EOS is forced, and scored like any other token.
        (found,) = search(
            model,
            [sentence],
            beam_size=len(every) + 1,
            max_lengths=[longest],
            min_length=min_length,
            length_penalty=penalty,
        )
        assert [each.tokens.tolist() for each in found] == [each for each, _ in expected]
        scores = torch.tensor([score for _, score in expected])
        assert_close(torch.tensor([each.score for each in found]), scores)


@given(
    seed=st.integers(0, 1000),
    sentences=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
    beam_size=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_result_does_not_depend_on_the_rest_of_the_batch(
    make_model, seed: int, sentences: list[int], beam_size: int, data: st.DataObject
) -> None:
    sentences.sort()
    limits = [data.draw(st.integers(1, 8)) for _ in sentences]
    model = make_model(seed=seed)
    together = search(model, sentences, beam_size=beam_size, max_lengths=limits)
    alone = [
        search(model, [sentence], beam_size=beam_size, max_lengths=[limit])[0]
        for sentence, limit in zip(sentences, limits, strict=True)
    ]
    assert tokens(together) == tokens(alone)


@given(seed=st.integers(0, 1000), beam_size=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_hypotheses_carry_the_scores_of_their_tokens(make_model, seed: int, beam_size: int) -> None:
    model = make_model(seed=seed)
    for sentence, hypotheses in enumerate(search(model, [0, 1, 2], beam_size=beam_size)):
        assert 1 <= len(hypotheses) <= beam_size
        assert len({tuple(each.tokens.tolist()) for each in hypotheses}) == len(hypotheses)
        scores = [each.score for each in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for each in hypotheses:
            sequence = each.tokens.tolist()
            assert PAD not in sequence
            assert sequence.index(EOS) == len(sequence) - 1
            assert 2 <= len(sequence) <= 7  # 1 to 6 words and EOS
            expected = torch.tensor(model.score(sentence, sequence))
            assert_close(each.positional_scores, expected)
            assert each.score == pytest.approx(expected.mean().item(), abs=1e-5)


@given(seed=st.integers(0, 1000), min_length=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_one_beam_equals_greedy(make_model, seed: int, min_length: int) -> None:
    model = make_model(seed=seed)
    sentences, limits = [0, 1, 2, 3], [3, 8, 5, 6]
    options = {"max_lengths": limits, "min_length": min_length}
    found = search(model, sentences, beam_size=1, **options)
    greedy = greedy_search(
        model.step,
        model.start(sentences),
        torch.full((4,), EOS),
        eos_index=EOS,
        padding_index=PAD,
        **options,
    )
    assert [each[0].tokens.tolist() for each in found] == [each.tolist() for each in greedy]


class Chain:
    """A Markov chain: the state is nothing but the last token."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        self.table = torch.full((5, 5), 1e-9)
        for before, row in table.items():
            for after, probability in row.items():
                self.table[before, after] = probability

    def start(self, sentences: list[int]) -> "Chain":
        return self

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        pass

    def step(self, tokens: Tensor, state: "Chain") -> Tensor:
        return self.table[tokens].log()


def test_only_an_end_among_the_first_candidates_finishes() -> None:
    a, b = 3, 4
    model = Chain({EOS: {a: 0.5, EOS: 0.3, b: 0.2}, a: {b: 0.9, EOS: 0.1}, b: {EOS: 1.0}})
    # One beam: EOS ranks second at the first and the second step and does not count.
    one = search(model, [0], beam_size=1, min_length=0)
    assert tokens(one) == [[[a, b, EOS]]]
    assert one[0][0].score == pytest.approx(torch.tensor(0.45).log().item() / 3, abs=1e-5)
    # Two beams: EOS ranks second at once; "b EOS" (0.2) then ranks second behind "a b" (0.45)
    # and is the second end found, so the search stops before "a b EOS", the best of all.
    two = search(model, [0], beam_size=2, min_length=0)
    assert sorted(tokens(two)[0]) == [[EOS], [b, EOS]]


def test_longest_sentences_are_forced_to_end() -> None:
    a = 3
    model = Chain({EOS: {a: 1.0}, a: {a: 0.99, EOS: 0.01}})
    found = search(model, [0, 1], beam_size=1, max_lengths=[2, 4])
    assert tokens(found) == [[[a, a, EOS]], [[a] * 4 + [EOS]]]
    assert found[0][0].positional_scores[-1].exp().item() == pytest.approx(0.01, rel=1e-4)


def test_finished_sentences_leave_the_batch() -> None:
    a, rows = 3, []
    model = Chain({EOS: {a: 1.0}, a: {a: 1.0}})

    def step(tokens: Tensor, state: Chain) -> Tensor:
        rows.append(len(tokens))
        return model.step(tokens, state)

    first = torch.full((3,), EOS)
    options = {"beam_size": 2, "eos_index": EOS, "padding_index": PAD}
    beam_search(step, model, first, max_lengths=[1, 3, 3], **options)
    # One row each at first, then two beams of three sentences, then of two.
    assert rows == [3, 6, 4, 4]


def test_constraint_sees_the_tokens_and_changes_the_search(make_model) -> None:
    def no_repetition(log_probs: Tensor, tokens: Tensor) -> Tensor:
        return log_probs.scatter(1, tokens, -torch.inf)

    model = make_model(seed=3)
    free = search(model, [0, 1])
    constrained = search(model, [0, 1], constrain=no_repetition, max_lengths=[4, 4])
    for hypotheses in constrained:
        for each in hypotheses:
            assert len(set(each.tokens.tolist())) == len(each.tokens)
    assert any(len(set(each)) < len(each) for each in tokens(free)[0] + tokens(free)[1])


def test_penalties() -> None:
    # Wu et al. 2016, Eq. 14: ((5 + 7) / 6)^0.6 = 2^0.6.
    assert gnmt_penalty(0.6)(7) == pytest.approx(1.5157166)
    assert power_penalty(0.5)(9) == 3.0
    assert power_penalty(0.0)(9) == 1.0


def test_no_sentences_give_no_results(make_model: Callable) -> None:
    assert search(make_model(), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size must be at least 1"),
        ({"max_lengths": [3]}, "one number for each of the 2 sentences"),
        ({"max_lengths": [3, 1], "min_length": 2}, r"at least min_length \(2\)"),
    ],
)
def test_wrong_use_is_refused(make_model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(make_model(), [0, 1], **options)
