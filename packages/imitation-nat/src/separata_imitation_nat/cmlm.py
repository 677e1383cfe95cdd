"""Mask-predict, the iterative peer (CMLM, Ghazvininejad et al. 2019): fill, doubt, fill again.

Shapes: B sentences, G candidate lengths of each, N = B * G candidates, T longest candidate,
V vocabulary, R iterations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from separata_shared.data.vocabulary import EOS, PAD, UNK
from torch import Tensor
from torch.nn import functional as F

from .decode import Lengths, ParallelTranslation, longest_output, most_likely
from .length import first_of_equals, length_mask
from .model import MaskPredictor

MASK = UNK
"""The token that stands for a word to be predicted."""

BestWords = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From logits ``(N, T, V)`` to the words' log-probabilities and the words, each ``(N, T)``."""


class Refined(NamedTuple):
    """What ``refine`` found."""

    tokens: Tensor
    """``(N, T)``."""
    log_probs: Tensor
    """Of each word when it was filled in ``(N, T)``; 0 where the input was given."""
    history: Tensor
    """``(N, 2 R, T)``: the input, then filled and masked tokens in turn; the result is last."""


def best_words(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely words, never a special token."""
    log_probs, words = logits.float().log_softmax(dim=-1)[..., MASK + 1 :].max(dim=-1)
    return log_probs, words + (MASK + 1)


def refine(
    decode: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    iterations: int,
    words: BestWords = best_words,
) -> Refined:
    """Fill the masks of ``tokens``, then mask the least likely words again, fewer each time.

    After iteration r of R, ``floor(n (1 - r / R))`` of the n words are masked again.

    Args:
        decode: From tokens ``(N, T)`` to logits ``(N, T, V)``; called once per iteration.
        tokens: ``(N, T)`` with masks; what is not masked stays as it is.
        iterations: R.
        words: From logits to words.

    Returns:
        The words, their log-probabilities and every state on the way.
    """
    wanted = masked = tokens.eq(MASK)
    log_probs = torch.zeros_like(tokens, dtype=torch.float32)
    history = [tokens]
    for iteration in range(1, iterations + 1):
        found_log_probs, found = words(decode(tokens))
        tokens = torch.where(masked, found, tokens)
        log_probs = torch.where(masked, found_log_probs, log_probs)
        history.append(tokens)
        if iteration < iterations:
            share = 1 - iteration / iterations
            scores = log_probs.masked_fill(~wanted, torch.inf)
            masked = least_likely(scores, wanted.sum(dim=1), share)
            tokens = tokens.masked_fill(masked, MASK)
            history.append(tokens)
    return Refined(tokens, log_probs, torch.stack(history, dim=1))


def least_likely(scores: Tensor, counts: Tensor, share: float) -> Tensor:
    """Choose the lowest scores of each row.

    Args:
        scores: ``(N, T)``; ``inf`` where nothing may be chosen.
        counts: Words of each row ``(N,)``.
        share: How many of them are chosen, rounded down.

    Returns:
        Boolean ``(N, T)``.
    """
    chosen = length_mask((counts * share).long(), scores.size(1))
    return torch.zeros_like(chosen).scatter(1, scores.argsort(dim=1, stable=True), chosen)


@torch.inference_mode()
def mask_predict(
    model: MaskPredictor,
    source: Tensor,
    *,
    iterations: int,
    lengths: Lengths = most_likely,
    longest: Callable[[Tensor], Tensor] = longest_output,
) -> ParallelTranslation:
    """Translate a batch in ``iterations`` decoder passes.

    All candidate lengths are one batch; the best mean log-probability wins, as in the paper.

    Args:
        model: Model in evaluation mode.
        source: Tokens ``(B, S)``, padded on the right.
        iterations: Decoder passes R.
        lengths: Which lengths to decode, such as ``decode.top_lengths(5)``.
        longest: From source lengths ``(B,)`` to the most tokens of a translation.

    Raises:
        ValueError: There is no sentence or no iteration.
    """
    if not len(source):
        raise ValueError("source: has no sentence")
    if iterations < 1:
        raise ValueError(f"iterations: must be at least 1, got {iterations}")
    encoding = model.encode(source)
    source_lengths = encoding.mask.sum(dim=1)
    wanted = lengths(
        model.predict_length(encoding), model.length, source_lengths, longest(source_lengths)
    )  # (B, G)
    mask = length_mask(wanted.flatten(), int(wanted.max()))
    found = refine(
        lambda tokens: model.decode(encoding, tokens), masked_canvas(mask), iterations=iterations
    )
    scores = (found.log_probs.sum(dim=1) / mask.sum(dim=1)).view(wanted.shape)
    scores = scores.masked_fill(~first_of_equals(wanted), -torch.inf)
    best = scores.argmax(dim=1, keepdim=True)
    candidates = found.tokens.view(*wanted.shape, -1)
    chosen = candidates.take_along_dim(best[:, :, None], dim=1).squeeze(1)
    return ParallelTranslation(
        chosen, scores.gather(1, best).squeeze(1), candidates, wanted, scores
    )


def masked_canvas(mask: Tensor) -> Tensor:
    """Tokens ``(N, T)`` that are all masked but for EOS at the last place of ``mask``."""
    last = mask & ~F.pad(mask, (0, 1), value=False)[:, 1:]
    canvas = torch.full_like(mask, MASK, dtype=torch.long)
    return canvas.masked_fill(last, EOS).masked_fill(~mask, PAD)


def mask_words(target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Make a training example: a uniform share of each sentence's words is masked, at least one.

    Args:
        target: Tokens ``(B, T)``, each ending in EOS and padded; EOS is never masked.
        real: Boolean ``(B, T)``, True = token.

    Returns:
        The decoder's input ``(B, T)``, and which words were masked, boolean ``(B, T)``.
    """
    wanted = real & target.ne(EOS)
    counts = wanted.sum(dim=1)
    share = torch.rand(len(target), device=target.device)
    # Uniform over 1 .. n; a sentence without words has none to mask.
    number = (share * counts).long().add(1).minimum(counts)
    order = torch.rand(target.shape, device=target.device).masked_fill(~wanted, torch.inf)
    chosen = length_mask(number, target.size(1))
    masked = torch.zeros_like(chosen).scatter(1, order.argsort(dim=1), chosen)
    return target.masked_fill(masked, MASK), masked
