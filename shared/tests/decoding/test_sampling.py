import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.decoding import greedy_search, sample
from torch import Tensor

PAD, EOS = 1, 2
# Probabilities of tokens 0, 3, 4, 5, and of EOS; padding gets a tempting logit.
PROBABILITIES = torch.tensor([0.05, 0.0, 0.1, 0.4, 0.15, 0.3])


class Constant:
    """Every token has the same distribution, whatever came before."""

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        pass

    def step(self, tokens: Tensor, state: "Constant") -> Tensor:
        logits = PROBABILITIES.log().expand(len(tokens), -1).clone()
        logits[:, PAD] = 9.0
        return logits


def draw(sentences: int = 1, length: int = 2000, **options) -> list[Tensor]:
    return sample(
        Constant().step,
        Constant(),
        torch.full((sentences,), EOS),
        max_lengths=[length] * sentences,
        eos_index=EOS,
        padding_index=PAD,
        **{"generator": torch.Generator().manual_seed(0), "min_length": length, **options},
    )


def shares(**options) -> Tensor:
    """Relative frequency of each token in 2000 draws without EOS."""
    (tokens,) = draw(**options)
    return tokens[:-1].bincount(minlength=6) / 2000


def test_draws_follow_the_probabilities() -> None:
    # EOS is not allowed yet, so the others share 0.9. Four standard deviations are below 0.045.
    expected = PROBABILITIES.where(torch.arange(6) != EOS, 0.0) / 0.9
    assert (shares() - expected).abs().max() < 0.045
    warm = PROBABILITIES.where(torch.arange(6) != EOS, 0.0).sqrt()
    assert (shares(temperature=2.0) - warm / warm.sum()).abs().max() < 0.045


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {3, 5}),
        ({"top_k": 50}, {0, 3, 4, 5}),
        # 0.4, 0.3, 0.15 and 0.05 of 0.9 sum to 0.44, 0.78, 0.94 and 1.
        ({"top_p": 0.4}, {3}),
        ({"top_p": 0.7}, {3, 5}),
        ({"top_p": 0.8}, {3, 4, 5}),
        ({"top_p": 1.0}, {0, 3, 4, 5}),
        # Of the best two, 0.57 and 0.43.
        ({"top_k": 2, "top_p": 0.5}, {3}),
        ({"temperature": 0.01}, {3}),
    ],
)
def test_support(options: dict, support: set[int]) -> None:
    assert set(shares(**options).nonzero().flatten().tolist()) == support


def test_same_seed_same_tokens() -> None:
    def tokens(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [each.tolist() for each in draw(4, 20, generator=generator, min_length=1)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_sequences_end_where_they_should() -> None:
    # EOS has probability 0.1 at each step: most sentences end before 30.
    found = draw(200, 30, min_length=2)
    for each in found:
        assert each.tolist().index(EOS) == len(each) - 1
        assert PAD not in each
    lengths = torch.tensor([len(each) for each in found])
    assert lengths.min() == 3
    assert lengths.max() == 31  # missing it in 200 sentences has probability 1e-5
    # The length is 2 + a geometric variable of mean 10 cut at 29, mean 9.5; four standard
    # deviations of the mean of 200 are 2.2.
    assert lengths.float().mean().item() == pytest.approx(11.5, abs=2.2)


@given(seed=st.integers(0, 1000), limits=st.lists(st.integers(1, 8), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_greedy_result_does_not_depend_on_the_rest_of_the_batch(
    make_model, seed: int, limits: list[int]
) -> None:
    model = make_model(seed=seed)

    def greedy(sentences: list[int], limits: list[int]) -> list[list[int]]:
        first = torch.full((len(sentences),), EOS)
        found = greedy_search(
            model.step,
            model.start(sentences),
            first,
            max_lengths=limits,
            eos_index=EOS,
            padding_index=PAD,
        )
        return [each.tolist() for each in found]

    sentences = list(range(len(limits)))
    alone = [greedy([each], [limit])[0] for each, limit in zip(sentences, limits, strict=True)]
    assert greedy(sentences, limits) == alone


def test_no_sentences_give_no_results() -> None:
    assert draw(0) == []


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}]
)
def test_wrong_use_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw(**options)
