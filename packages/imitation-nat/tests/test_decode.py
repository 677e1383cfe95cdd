"""One-pass decoding and length head (specification, acceptance checks 1, 8 and 9)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.build import build_learner, build_teacher
from separata_imitation_nat.config import ModelConfig, ParallelDecodeConfig
from separata_imitation_nat.decode import (
    Lengths,
    ParallelTranslation,
    Scorer,
    collapse_repeats,
    configured,
    first_of_largest,
    longest_output,
    most_likely,
    own_scores,
    parallel_decode,
    source_window,
    teacher_scorer,
    teacher_scores,
    top_lengths,
    window,
)
from separata_imitation_nat.length import (
    LengthHead,
    absolute_length,
    first_of_equals,
    length_difference,
    length_loss,
    length_mask,
    length_window,
)
from separata_imitation_nat.model import Learner
from separata_shared.data.vocabulary import BOS, EOS, PAD
from separata_shared.nn import Transformer
from torch import Tensor
from torch.testing import assert_close

properties = settings(deadline=None, max_examples=10)
VOCABULARY = 13


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"width": 8, "num_heads": 2, "hidden_width": 12, "max_length": 64}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "num_actions": 5}
    types = {"source_vocabulary_size": VOCABULARY, "target_vocabulary_size": VOCABULARY}
    return ModelConfig(**sizes | types | changes)


def sentences(lengths: list[int], seed: int = 0) -> Tensor:
    """Random tokens (B, S), each ending in EOS, padded on the right."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    tokens = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=random)
    tokens = tokens.masked_fill(~length_mask(sizes, max(lengths)), PAD)
    return tokens.scatter(1, sizes[:, None] - 1, EOS)


def near(learner: Learner, difference: int) -> None:
    """Let the length head prefer T - S = ``difference``, then its neighbours."""
    classes = torch.arange(learner.length.projection.out_features) - 128
    preference = -(classes - difference).abs().float()
    learner.length.projection.weight.data.mul_(0.01)
    # The head has no bias to set, so it is added to what the head says.
    learner.length.projection.register_forward_hook(lambda module, x, y: y + preference)


def pair(seed: int, difference: int = 0) -> tuple[Learner, Transformer]:
    torch.manual_seed(seed)
    learner, teacher = build_learner(config()).eval(), build_teacher(config()).eval()
    near(learner, difference)
    return learner, teacher


def words(tokens: Tensor) -> list[list[int]]:
    return [row[row != PAD].tolist() for row in tokens]


sources = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@properties
@given(lengths=sources, seed=st.integers(0, 99), difference=st.integers(-9, 3))
def test_a_translation_is_one_decoder_pass_and_one_encoder_pass(lengths, seed, difference) -> None:
    learner, teacher = pair(seed, difference)
    calls: list[str] = []
    parts = {
        "encoder": learner.encoder,
        "decoder": learner.decoder,
        "teacher encoder": teacher.encoder,
        "teacher decoder": teacher.decoder,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    source = sentences(lengths, seed)
    parallel_decode(learner, source)
    assert calls == ["encoder", "decoder"]
    calls.clear()
    # The call is given no target at all, so nothing of one can enter.
    found = parallel_decode(learner, source, lengths=window(3), scorer=teacher_scorer(teacher))
    assert calls == list(parts)
    assert found.candidates.shape[:2] == (len(lengths), 7)


@properties
@given(lengths=sources, seed=st.integers(0, 99), difference=st.integers(-9, 3))
def test_candidates_have_their_lengths_and_no_special_token_inside(
    lengths, seed, difference
) -> None:
    learner, teacher = pair(seed, difference)
    source = sentences(lengths, seed)
    found = parallel_decode(learner, source, lengths=window(2), scorer=teacher_scorer(teacher))
    for row, wanted in zip(found.candidates, found.candidate_lengths, strict=True):
        for tokens, length in zip(words(row), wanted.tolist(), strict=True):
            assert len(tokens) == length >= 1
            assert tokens[-1] == EOS
            assert not {BOS, PAD, EOS} & set(tokens[:-1])


@properties
@given(
    lengths=sources, radius=st.integers(0, 4), seed=st.integers(0, 99),
    difference=st.integers(-9, 30),
)  # fmt: skip
def test_the_lengths_of_a_window_are_contiguous_and_each_is_scored_once(
    lengths, radius, seed, difference
) -> None:
    learner, _ = pair(seed, difference)
    source = sentences(lengths, seed)
    found = parallel_decode(learner, source, lengths=window(radius), scorer=own_scores)
    assert found.candidate_scores is not None
    for row, size in enumerate(lengths):
        scored = found.candidate_scores[row] > -torch.inf
        kept = found.candidate_lengths[row][scored].tolist()
        centre = min(max(size + difference, 1), 2 * size + 20)
        least, most = max(centre - radius, 1), min(centre + radius, 2 * size + 20)
        assert kept == list(range(least, most + 1))


@properties
@given(
    lengths=sources, radius=st.integers(0, 3), offset=st.integers(-9, 40), seed=st.integers(0, 99)
)  # fmt: skip
def test_a_window_around_the_source_does_not_ask_the_length_head(
    lengths, radius, offset, seed
) -> None:
    learner, _ = pair(seed, difference=17)
    chosen = source_window(radius, offset=offset)
    found = parallel_decode(learner, sentences(lengths, seed), lengths=chosen, scorer=own_scores)
    assert found.candidate_scores is not None
    for row, size in enumerate(lengths):
        scored = found.candidate_scores[row] > -torch.inf
        longest = 2 * size + 20
        centre = min(max(size + offset, 1), longest)
        wanted = range(max(centre - radius, 1), min(centre + radius, longest) + 1)
        assert found.candidate_lengths[row][scored].tolist() == list(wanted)


@properties
@given(lengths=sources, k=st.integers(1, 6), seed=st.integers(0, 99))
def test_top_lengths_are_the_most_likely_possible_ones(lengths, k, seed) -> None:
    learner, _ = pair(seed, -2)
    source = sentences(lengths, seed)
    found = parallel_decode(learner, source, lengths=top_lengths(k), scorer=own_scores)
    with torch.no_grad():
        logits = learner.predict_length(learner.encode(source))
    for row, size in enumerate(lengths):
        order = logits[row].argsort(descending=True) - 128 + size
        possible = [n for n in order.tolist() if 1 <= n <= 2 * size + 20]
        assert found.candidate_lengths[row].tolist() == possible[:k]


SCORERS = ["teacher", "self"]


def scorer_of(name: str, teacher: Transformer) -> Scorer:
    return {"teacher": teacher_scorer(teacher), "self": own_scores}[name]


@pytest.mark.parametrize("name", SCORERS)
@properties
@given(lengths=sources, seed=st.integers(0, 99), difference=st.integers(-9, 3))
def test_a_window_of_radius_zero_is_greedy(name, lengths, seed, difference) -> None:
    learner, teacher = pair(seed, difference)
    source = sentences(lengths, seed)
    greedy = parallel_decode(learner, source)
    found = parallel_decode(learner, source, lengths=window(0), scorer=scorer_of(name, teacher))
    assert torch.equal(found.tokens, greedy.tokens)
    assert greedy.scores is None


@pytest.mark.parametrize("name", SCORERS)
@properties
@given(lengths=sources, seed=st.integers(0, 99), difference=st.integers(-9, 3))
def test_a_larger_window_never_lowers_the_winning_score(name, lengths, seed, difference) -> None:
    learner, teacher = pair(seed, difference)
    source, scorer = sentences(lengths, seed), scorer_of(name, teacher)
    last = torch.full((len(lengths),), -torch.inf)
    for radius in range(4):
        scores = parallel_decode(learner, source, lengths=window(radius), scorer=scorer).scores
        assert scores is not None
        assert (scores >= last - 1e-5).all()
        last = scores


@pytest.mark.parametrize("name", SCORERS)
@properties
@given(lengths=sources, seed=st.integers(0, 99), difference=st.integers(-9, 3))
def test_batched_and_single_sentences_have_the_same_winner(name, lengths, seed, difference) -> None:
    learner, teacher = pair(seed, difference)
    source, scorer = sentences(lengths, seed), scorer_of(name, teacher)
    padded = torch.nn.functional.pad(source, (0, 2), value=PAD)
    together = parallel_decode(
        learner, padded, lengths=window(2), scorer=scorer, round_up=lambda size: -(-size // 8) * 8
    )
    assert together.scores is not None
    assert together.tokens.size(1) % 8 == 0
    for row, size in enumerate(lengths):
        alone = parallel_decode(
            learner, source[row : row + 1, :size], lengths=window(2), scorer=scorer
        )
        assert alone.scores is not None
        assert_close(together.scores[row], alone.scores[0], atol=1e-5, rtol=1e-5)
        assert alone.candidate_scores is not None
        best, second = (*alone.candidate_scores[0].topk(2).values.tolist(),)
        if best - second > 1e-4:
            assert words(together.tokens)[row] == words(alone.tokens)[0]


@properties
@given(lengths=sources, seed=st.integers(0, 99))
def test_the_teachers_score_of_a_candidate_is_that_of_reading_it_alone(lengths, seed) -> None:
    learner, teacher = pair(seed)
    source = sentences(lengths, seed)
    found = parallel_decode(learner, source, lengths=window(2), scorer=teacher_scorer(teacher))
    assert found.candidate_scores is not None
    for row, size in enumerate(lengths):
        for g, tokens in enumerate(words(found.candidates[row])):
            if found.candidate_scores[row, g] == -torch.inf:
                continue
            target = torch.tensor([tokens])
            with torch.no_grad():
                shifted = torch.nn.functional.pad(target, (1, -1), value=EOS)
                logits = teacher(source[row : row + 1, :size], shifted)
            expected = logits.log_softmax(dim=-1).gather(-1, target[..., None]).mean()
            assert_close(found.candidate_scores[row, g], expected, atol=1e-5, rtol=1e-5)
            single = teacher_scores(teacher, source[row : row + 1, :size], target)
            assert_close(single[0], expected, atol=1e-5, rtol=1e-5)


def test_a_target_of_one_token_is_the_end_alone() -> None:
    learner, teacher = pair(1, difference=-50)
    found = parallel_decode(
        learner, sentences([1, 3]), lengths=window(0), scorer=teacher_scorer(teacher)
    )
    assert found.tokens.tolist() == [[EOS], [EOS]]


def test_nothing_to_translate_is_refused() -> None:
    learner, _ = pair(1)
    with pytest.raises(ValueError, match="no sentence"):
        parallel_decode(learner, torch.zeros(0, 3, dtype=torch.long))


# Length head.


@pytest.mark.parametrize(("offset", "least", "most"), [(128, -128, 127), (20, -20, 20)])
def test_classes_cover_the_offsets_and_extremes_are_clamped(offset, least, most) -> None:
    head = build_learner(config(length_offset=offset)).length
    source = torch.full((4,), 200)
    differences = torch.tensor([least, most, least - 9, most + 9])
    classes = head.classes(source, source + differences)
    count = head.projection.out_features
    assert classes.tolist() == [0, count - 1, 0, count - 1]
    assert count == most - least + 1
    assert (head.lengths(classes[:2], source[:2]) - 200).tolist() == [least, most]


@properties
@given(lengths=sources, seed=st.integers(0, 99), padding=st.integers(0, 3))
def test_length_probabilities_sum_to_one_whatever_the_padding(lengths, seed, padding) -> None:
    torch.manual_seed(seed)
    learner, source = build_learner(config()).eval(), sentences(lengths, seed)
    logits = learner.predict_length(learner.encode(source))
    assert_close(logits.softmax(dim=-1).sum(dim=-1), torch.ones(len(lengths)))
    padded = torch.nn.functional.pad(source, (0, padding), value=PAD)
    assert_close(learner.predict_length(learner.encode(padded)), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "lengths", [most_likely, window(3), top_lengths(300), source_window(3, offset=-5)]
)
@properties
@given(
    source=st.lists(st.integers(1, 300), min_size=1, max_size=4), seed=st.integers(0, 99),
    longest=st.integers(1, 30),
)  # fmt: skip
def test_every_length_is_possible(lengths: Lengths, source, seed, longest) -> None:
    random = torch.Generator().manual_seed(seed)
    for first, classes in ((length_difference(-128), 256), (absolute_length, 40)):
        head = LengthHead(4, classes, first_length=first)
        logits = 9 * torch.randn(len(source), classes, generator=random)
        found = lengths(logits, head, torch.tensor(source), torch.full((len(source),), longest))
        assert (found >= 1).all()
        assert (found <= longest).all()


def test_the_mean_length_loss_is_the_negative_log_likelihood() -> None:
    logits, classes = torch.randn(3, 41), torch.tensor([0, 20, 40])
    expected = -logits.log_softmax(dim=-1)[torch.arange(3), classes].mean()
    assert_close(length_loss(logits, classes), expected)


def test_windows_and_repeated_lengths() -> None:
    found = length_window(torch.tensor([2, 9]), 4, least=1)
    assert found.tolist() == [[1, 1, 2, 3], [7, 8, 9, 10]]
    assert first_of_equals(found).tolist() == [[True, False, True, True], [True] * 4]
    assert longest_output(torch.tensor([7])).tolist() == [34]  # 2 S + 20


# Clean-up and configuration.


@properties
@given(rows=st.lists(st.lists(st.integers(4, 6), max_size=8), min_size=1, max_size=4))
def test_collapsing_leaves_no_token_twice_in_a_row(rows) -> None:
    size = max(map(len, rows)) + 2
    tokens = torch.tensor([[*row, EOS, *[PAD] * (size - len(row) - 1)] for row in rows])
    expected = [
        [token for place, token in enumerate(row) if place == 0 or token != row[place - 1]] + [EOS]
        for row in rows
    ]
    assert words(collapse_repeats(tokens)) == expected
    assert torch.equal(collapse_repeats(tokens), collapse_repeats(collapse_repeats(tokens)))


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize(
    ("settings_", "count"),
    [
        ({"scorer": "none", "radius": 3}, 1),
        ({"scorer": "self", "radius": 2}, 5),
        ({"scorer": "teacher", "lengths": "top_k", "top_k": 4}, 4),
        ({"scorer": "self", "lengths": "source", "radius": 2, "offset": 1}, 5),
    ],
)
def test_the_configuration_decides_lengths_and_scorer(settings_, count, collapse) -> None:
    learner, teacher = pair(1)
    chosen = ParallelDecodeConfig(collapse=collapse, **settings_)
    source = sentences([4, 6])
    found: ParallelTranslation = configured(chosen, teacher=teacher, max_length=9)(learner, source)
    assert found.candidates.size(1) == chosen.candidates == count
    assert found.candidate_lengths.max() <= 9
    repeated = found.tokens[:, 1:].eq(found.tokens[:, :-1]) & found.tokens[:, 1:].ne(PAD)
    assert not (collapse and repeated.any())


def test_without_a_scorer_the_centre_of_the_window_is_decoded() -> None:
    learner, _ = pair(1, difference=2)
    expected = {"window": [6, 8], "top_k": [6, 8], "source": [7, 9]}
    for lengths, wanted in expected.items():
        chosen = ParallelDecodeConfig(scorer="none", lengths=lengths, offset=3, radius=2)
        found = configured(chosen, max_length=20)(learner, sentences([4, 6]))
        assert found.candidate_lengths.flatten().tolist() == wanted


def test_a_missing_teacher_and_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"parallel\.scorer"):
        configured(ParallelDecodeConfig(scorer="teacher"), max_length=9)
    for name, value in (("radius", -1), ("top_k", 0), ("max_tokens", 0)):
        with pytest.raises(ValueError, match=rf"parallel\.{name}"):
            ParallelDecodeConfig(**{name: value})


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 2.0, torch.inf, torch.nan]), min_size=23),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 23),
)
def test_the_first_of_the_largest_in_two_steps(rows: list[list[float]], size: int) -> None:
    x = torch.tensor([row[:size] for row in rows])
    assert torch.equal(first_of_largest(x), x.argmax(dim=-1))


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 1000, 31997])
def test_the_largest_is_found_at_every_kind_of_place(size: int) -> None:
    places = torch.tensor([0, size // 3, size // 2, size - size // 5 - 1, size - 1])
    x = torch.randn(5, size + 3)[:, 3:].scatter(1, places[:, None], 99.0)
    assert torch.equal(first_of_largest(x), places)
