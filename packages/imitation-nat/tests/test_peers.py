"""Mask-predict, the CRF and the codebook beside the method."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.build import build_mask_predictor
from separata_imitation_nat.cmlm import (
    MASK,
    least_likely,
    mask_predict,
    mask_words,
    masked_canvas,
    refine,
)
from separata_imitation_nat.codebook import EMACodebook
from separata_imitation_nat.config import ModelConfig
from separata_imitation_nat.crf import LowRankCRF
from separata_imitation_nat.decode import top_lengths
from separata_imitation_nat.length import length_mask
from separata_shared.data.vocabulary import BOS, EOS, PAD
from torch import Tensor
from torch.testing import assert_close

properties = settings(deadline=None, max_examples=25)


def mask_predictor(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"width": 8, "num_heads": 2, "hidden_width": 12}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1}
    types = {"source_vocabulary_size": 13, "target_vocabulary_size": 13}
    return build_mask_predictor(ModelConfig(**sizes | types | changes)).eval()


SOURCE = torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD]])


# Mask-predict.


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_mask_predict_takes_a_pass_for_each_iteration_and_leaves_no_mask(iterations) -> None:
    torch.manual_seed(1)
    model = mask_predictor()
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    found = mask_predict(model, SOURCE, iterations=iterations, lengths=top_lengths(3))
    assert len(calls) == iterations
    for row, wanted in zip(found.candidates, found.candidate_lengths, strict=True):
        for tokens, length in zip(row, wanted.tolist(), strict=True):
            assert tokens[length - 1] == EOS
            assert not {BOS, PAD, EOS, MASK} & set(tokens[: length - 1].tolist())
            assert tokens[length:].eq(PAD).all()


def test_mask_predict_of_one_sentence_does_not_depend_on_the_others() -> None:
    torch.manual_seed(2)
    model = mask_predictor()
    together = mask_predict(model, SOURCE, iterations=4)
    alone = mask_predict(model, SOURCE[1:, :2], iterations=4)
    tokens = together.tokens[1]
    assert tokens[tokens != PAD].tolist() == alone.tokens[0].tolist()
    assert together.scores is not None
    assert alone.scores is not None
    assert_close(together.scores[1], alone.scores[0], atol=1e-5, rtol=1e-5)


def test_mask_predict_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="iterations"):
        mask_predict(mask_predictor(), SOURCE, iterations=0)
    with pytest.raises(ValueError, match="no sentence"):
        mask_predict(mask_predictor(), SOURCE[:0], iterations=1)


@properties
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), iterations=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_ever_fewer_words_are_masked_again_and_the_rest_stays(lengths, iterations, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    canvas = masked_canvas(length_mask(torch.tensor(lengths), max(lengths)))
    logits = torch.randn(*canvas.shape, 11, generator=random)
    found = refine(lambda tokens: logits, canvas, iterations=iterations)
    assert torch.equal(found.history[:, 0], canvas)
    assert torch.equal(found.history[:, -1], found.tokens)
    words = canvas.eq(MASK)
    for step in range(1, iterations):
        filled, again = found.history[:, 2 * step - 1], found.history[:, 2 * step]
        masked = again.eq(MASK)
        share = 1 - step / iterations
        assert masked.sum(dim=1).tolist() == [
            int(torch.tensor(float(n)) * share) for n in words.sum(dim=1).tolist()
        ]
        assert torch.equal(again[~masked], filled[~masked])
        assert not (masked & ~words).any()
        for row in range(len(lengths)):  # the masked ones are the least likely
            if masked[row].any():
                kept = words[row] & ~masked[row]
                most = found.log_probs[row][masked[row]].max()
                assert (found.log_probs[row][kept] >= most).all()


def test_certain_words_do_not_make_what_was_given_maskable() -> None:
    scores = torch.tensor([[torch.inf, 0.0, -1.0, torch.inf]])  # log-probability 0 is a sure word
    assert least_likely(scores, torch.tensor([2]), 1.0).tolist() == [[False, True, True, False]]


@properties
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_training_masks_words_at_random_at_least_one_and_never_the_end(lengths, seed) -> None:
    torch.manual_seed(seed)
    target = masked_canvas(length_mask(torch.tensor(lengths), max(lengths)))
    target = target.masked_fill(target.eq(MASK), 7)
    tokens, masked = mask_words(target, target.ne(PAD))
    assert torch.equal(masked, tokens.eq(MASK))
    assert torch.equal(tokens[~masked], target[~masked])
    assert not (masked & target.ne(7)).any()
    for count, length in zip(masked.sum(dim=1).tolist(), lengths, strict=True):
        assert min(1, length - 1) <= count <= length - 1


def test_every_number_of_masked_words_is_as_likely() -> None:
    torch.manual_seed(1)
    target = torch.tensor([[7, 7, 7, 7, EOS]]).expand(4000, -1)
    _, masked = mask_words(target, target.ne(PAD))
    counts = masked.sum(dim=1).bincount(minlength=5)
    assert counts[0] == 0
    # 1000 of each are expected; 4.5 standard deviations of sqrt(4000 * 1/4 * 3/4) = 27.4.
    assert (counts[1:] - 1000).abs().max() < 4.5 * 27.4


# CRF.


@properties
@given(
    vocabulary=st.integers(2, 4), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_with_all_words_kept_the_crf_is_exact(vocabulary, lengths, seed) -> None:
    torch.manual_seed(seed)
    crf = LowRankCRF(vocabulary, rank=3, beam=vocabulary).double()
    mask = length_mask(torch.tensor(lengths), max(lengths))
    emissions = torch.randn(*mask.shape, vocabulary, dtype=torch.float64)
    targets = torch.randint(vocabulary, mask.shape)
    likelihood = crf(emissions, targets, mask)
    path = crf.viterbi(emissions, mask)
    for row, length in enumerate(lengths):
        scores = {
            y: chain_score(crf, emissions[row], y)
            for y in itertools.product(range(vocabulary), repeat=length)
        }
        total = torch.stack(list(scores.values())).logsumexp(dim=0)
        assert_close(likelihood[row], scores[tuple(targets[row, :length].tolist())] - total)
        best = max(scores, key=lambda y: scores[y])
        assert tuple(path.tokens[row, :length].tolist()) == best
        assert_close(path.scores[row].sum(), scores[best])


def chain_score(crf: LowRankCRF, emissions: Tensor, y: tuple[int, ...]) -> Tensor:
    score = sum(emissions[t, word] for t, word in enumerate(y))
    score = score + sum(crf.E1[a] @ crf.E2[b] for a, b in itertools.pairwise(y))
    return torch.as_tensor(score).detach()


@properties
@given(seed=st.integers(0, 99), beam=st.integers(1, 5))
def test_the_kept_words_include_the_target_so_likelihoods_are_no_gain(seed, beam) -> None:
    torch.manual_seed(seed)
    crf = LowRankCRF(9, rank=2, beam=beam)
    likelihood = crf(torch.randn(2, 5, 9), torch.randint(9, (2, 5)), torch.ones(2, 5, dtype=bool))
    assert (likelihood <= 1e-5).all()


# Codebook.


@properties
@given(seed=st.integers(0, 99), updates=st.integers(1, 4), decay=st.floats(0.1, 0.99))
def test_counts_and_sums_are_moving_averages_and_entries_their_quotient(
    seed, updates, decay
) -> None:
    torch.manual_seed(seed)
    book = EMACodebook(4, 3, decay=decay)
    count, total = book.count.clone(), book.total.clone()
    for _ in range(updates):
        z = torch.randn(2, 5, 3)
        distance = torch.cdist(z, book.A)
        _, index, commitment = book(z)
        assert torch.equal(index, distance.argmin(dim=-1))
        nearest = distance.amin(dim=-1).square() / 3
        assert_close(commitment, 0.25 * nearest)
        one_hot = torch.nn.functional.one_hot(index, 4).float()
        count = decay * count + (1 - decay) * one_hot.sum(dim=(0, 1))
        total = decay * total + (1 - decay) * torch.einsum("btk,btm->km", one_hot, z)
    assert_close(book.count, count)
    assert_close(book.total, total)
    smoothed = (count + 1e-5) / (count.sum() + 4e-5) * count.sum()
    assert_close(book.A, total / smoothed[:, None])


def test_a_codebook_follows_the_states_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    z = torch.randn(2, 5, 3)
    together, alone = EMACodebook(4, 3), EMACodebook(4, 3)
    alone.load_state_dict(together.state_dict())
    together(z)
    # What another process would add: the counts and sums of the second half.
    other = EMACodebook(4, 3)
    other.load_state_dict(alone.state_dict())
    index = other(z[1])[1]
    one_hot = torch.nn.functional.one_hot(index, 4).float()
    sums = iter([one_hot.sum(dim=0), one_hot.mT @ z[1]])
    monkeypatch.setattr("separata_imitation_nat.codebook.add_up", lambda own: own.add_(next(sums)))
    alone(z[0])
    assert_close(alone.state_dict(), together.state_dict())


def test_the_nearest_entry_is_found_in_float32_under_autocast() -> None:
    torch.manual_seed(1)
    book, z = EMACodebook(64, 16).eval(), torch.randn(500, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, index, _ = book(z)
    assert torch.equal(index, book(z)[1])


def test_the_gradient_passes_straight_through_and_commitment_pulls_to_the_entry() -> None:
    book = EMACodebook(3, 2).eval()
    z = torch.randn(4, 2, requires_grad=True)
    u, _, commitment = book(z)
    (3 * u.sum()).backward(retain_graph=True)
    assert_close(z.grad, torch.full((4, 2), 3.0))
    z.grad = None
    commitment.sum().backward()
    # 0.25 * mean over the 2 columns of (z - A)^2 has the gradient 0.25 (z - A).
    assert_close(z.grad, 0.25 * (z - u).detach())
