from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.decoding import (
    Hypothesis,
    any_token,
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


KEPT_PLACES = {"candidates_per_beam": 1, "limit": any_token}
A, B = 3, 4


def test_an_end_that_keeps_its_place_narrows_the_beam() -> None:
    # EOS is best at once (0.6). It keeps one of two places, so "b", third with 0.1, never enters.
    model = Chain({EOS: {EOS: 0.6, A: 0.3, B: 0.1}, A: {A: 1.0}, B: {EOS: 1.0}})
    options = {"beam_size": 2, "max_lengths": [2], "min_length": 0, "limit": any_token}
    both = {"enough": lambda finished, best_ended: finished >= 2}
    assert [B, EOS] in tokens(search(model, [0], **options, **both))[0]
    kept = search(model, [0], **options, **both, candidates_per_beam=1)
    assert tokens(kept) == [[[EOS]]]


def test_enough_sees_whether_an_end_was_ever_best() -> None:
    # The end is second at the first step and best at the second.
    model = Chain({EOS: {A: 0.6, EOS: 0.4}, A: {EOS: 0.9, A: 0.1}})
    seen = []

    def enough(finished: int, best_ended: bool) -> bool:
        seen.append((finished, best_ended))
        return best_ended and finished >= 2

    options = {"beam_size": 2, "min_length": 0, "enough": enough}
    found = search(model, [0], length_penalty=power_penalty(0.0), **options, **KEPT_PLACES)
    assert tokens(found) == [[[A, EOS], [EOS]]]
    assert {(1, False), (2, True)} <= set(seen)


def test_what_never_ends_gets_its_last_token_overwritten() -> None:
    model = Chain({EOS: {A: 0.9, B: 0.1}, A: {B: 1.0}, B: {A: 1.0}})
    found = search(model, [0, 1], beam_size=2, max_lengths=[2, 3], **KEPT_PLACES)
    assert tokens(found) == [[[A, B, EOS]], [[A, B, A, EOS]]]
    # The score is that of the token that stood there: 0.9 * 1 * 1, over three tokens.
    assert found[0][0].score == pytest.approx(torch.tensor(0.9).log().item() / 3, abs=1e-5)


@given(
    seed=st.integers(0, 1000),
    sentences=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
    beam_size=st.integers(1, 5),
    wanted=st.integers(1, 4),
    min_length=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_kept_places_do_not_depend_on_the_batch(
    make_model, seed: int, sentences: list[int], beam_size: int, wanted: int, min_length: int
) -> None:
    sentences.sort()
    options = {
        **KEPT_PLACES,
        "beam_size": beam_size,
        "min_length": min_length,
        "enough": lambda finished, best_ended: best_ended and finished >= wanted,
    }
    model = make_model(seed=seed)
    together = search(model, sentences, **options)
    assert all(each[0].tokens[-1] == EOS for each in together)
    alone = [search(model, [sentence], **options)[0] for sentence in sentences]
    assert tokens(together) == tokens(alone)


def test_scores_of_doubles_are_doubles(make_model) -> None:
    model = make_model(seed=1)
    model.by_place, model.by_sentence = model.by_place.double(), model.by_sentence.double()
    for each in search(model, [2])[0]:
        expected = sum(model.score(2, each.tokens.tolist())) / len(each.tokens)
        assert each.score == pytest.approx(expected, rel=1e-12)


def test_without_a_padding_token_every_token_can_be_generated() -> None:
    model = Chain({EOS: {PAD: 1.0}, PAD: {PAD: 0.4, EOS: 0.6}})
    options = {"max_lengths": [3], "eos_index": EOS, "padding_index": None}
    first = torch.tensor([EOS])
    beam = beam_search(model.step, model, first, beam_size=1, **options)
    greedy = greedy_search(model.step, model, first, **options)
    assert beam[0][0].tokens.tolist() == greedy[0].tolist() == [PAD, EOS]


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
        ({"candidates_per_beam": 3}, "candidates_per_beam must be 1 or 2"),
        ({"max_lengths": [3]}, "one number for each of the 2 sentences"),
        ({"max_lengths": [3, 1], "min_length": 2}, r"at least min_length \(2\)"),
    ],
)
def test_wrong_use_is_refused(make_model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(make_model(), [0, 1], **options)
