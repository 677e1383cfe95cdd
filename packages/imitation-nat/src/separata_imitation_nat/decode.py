"""Decoding in one pass: all candidate lengths in one batch, and the best of them by some score.

Shapes: B sentences, G candidate lengths of each, N = B * G candidates (those of a sentence
together), S source length, T longest candidate, V vocabulary, C length classes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from separata_shared.data.vocabulary import BOS, EOS, PAD
from separata_shared.nn import Transformer
from torch import Tensor
from torch.nn import functional as F

from .config import ParallelDecodeConfig
from .length import LengthHead, first_of_equals, length_mask, length_window
from .model import Learner

FIRST_WORD = max(BOS, PAD, EOS) + 1
"""Tokens from here on are words."""


class Candidates(NamedTuple):
    """Finished translations that wait for a score."""

    source: Tensor
    """Source tokens ``(B, S)``."""
    tokens: Tensor
    """``(N, T)``, each ending in EOS and padded."""
    mask: Tensor
    """Boolean ``(N, T)``, True = token."""
    logits: Tensor
    """The learner's, ``(N, T, V)``."""


class ParallelTranslation(NamedTuple):
    """What parallel decoding found; T is the longest candidate of the batch."""

    tokens: Tensor
    """The chosen translations ``(B, T)``, ending in EOS and padded."""
    scores: Tensor | None
    """Their scores ``(B,)``; None without a scorer."""
    candidates: Tensor
    """All translations ``(B, G, T)``."""
    candidate_lengths: Tensor
    """``(B, G)``, EOS counted."""
    candidate_scores: Tensor | None
    """``(B, G)``; ``-inf`` where a length came before in its row."""


Lengths = Callable[[Tensor, LengthHead, Tensor, Tensor], Tensor]
"""``lengths(logits (B, C), head, source_lengths (B,), longest (B,))``: lengths to decode
``(B, G)``, each from 1 to the longest output."""

Scorer = Callable[[Candidates], Tensor]
"""Gives every candidate a score ``(N,)``; the highest wins."""

Words = Callable[[Tensor, Tensor], Tensor]
"""``words(logits (N, T, V), last (N, T))``: tokens ``(N, T)``; ``last`` marks the last places."""


def most_likely(
    logits: Tensor, head: LengthHead, source_lengths: Tensor, longest: Tensor
) -> Tensor:
    """The most likely length alone, ``(B, 1)``."""
    return top_lengths(1)(logits, head, source_lengths, longest)


def window(radius: int) -> Lengths:
    """The ``2 * radius + 1`` lengths around the most likely one, as far as they are possible."""

    def lengths(
        logits: Tensor, head: LengthHead, source_lengths: Tensor, longest: Tensor
    ) -> Tensor:
        predicted = most_likely(logits, head, source_lengths, longest).squeeze(1)
        return length_window(predicted, 2 * radius + 1).minimum(longest[:, None])

    return lengths


def source_window(radius: int, *, offset: int = 0) -> Lengths:
    """The ``2 * radius + 1`` lengths around ``S + offset``, whatever the length head says."""

    def lengths(
        logits: Tensor, head: LengthHead, source_lengths: Tensor, longest: Tensor
    ) -> Tensor:
        centre = (source_lengths + offset).clamp(min=1).minimum(longest)
        return length_window(centre, 2 * radius + 1).minimum(longest[:, None])

    return lengths


def top_lengths(k: int) -> Lengths:
    """The k most likely of the possible lengths, best first; all where there are fewer."""

    def lengths(
        logits: Tensor, head: LengthHead, source_lengths: Tensor, longest: Tensor
    ) -> Tensor:
        classes = torch.arange(logits.size(1), device=logits.device)
        all_lengths = head.lengths(classes.expand_as(logits), source_lengths)
        possible = (all_lengths >= 1) & (all_lengths <= longest[:, None])
        best = logits.masked_fill(~possible, -torch.inf).topk(min(k, logits.size(1))).indices
        # Where fewer than k are possible, the others repeat the ends of the range.
        return all_lengths.gather(1, best).clamp(min=1).minimum(longest[:, None])

    return lengths


def words_then_end(logits: Tensor, last: Tensor) -> Tensor:
    """The best word at every place but the last, which is EOS: the length says where it stands.

    BOS and PAD are never produced, nor EOS in the middle, which would cut the sentence.
    """
    tokens = first_of_largest(logits[..., FIRST_WORD:]) + FIRST_WORD
    return tokens.masked_fill(last, EOS)


def first_of_largest(x: Tensor) -> Tensor:
    """``x.argmax(dim=-1)`` of ``x (..., V)``, first over blocks of places and then inside one.

    Torch's own looks at one number after the other on a CPU, which takes ten times as long for
    32,000 of them. Of equal places the first wins, and NaN before all.
    """
    size = x.size(-1)
    block = math.isqrt(size)
    whole = x.unfold(-1, block, block).amax(dim=-1)
    rest = x[..., -block:].amax(dim=-1, keepdim=True)  # overlaps the last whole block
    best = torch.cat([whole, rest], dim=-1).argmax(dim=-1, keepdim=True)
    start = (best * block).clamp(max=size - block)
    places = start + torch.arange(block, device=x.device)
    return start.squeeze(-1) + x.gather(-1, places).argmax(dim=-1)


def longest_output(source_lengths: Tensor) -> Tensor:
    """Most tokens of a translation, ``2 S + 20``."""
    return 2 * source_lengths + 20


@torch.inference_mode()
def parallel_decode(
    learner: Learner,
    source: Tensor,
    *,
    lengths: Lengths = most_likely,
    scorer: Scorer | None = None,
    words: Words = words_then_end,
    longest: Callable[[Tensor], Tensor] = longest_output,
    round_up: Callable[[int], int] = int,
) -> ParallelTranslation:
    """Translate a batch in exactly one decoder pass.

    The source is encoded once, and the candidates of a sentence share its states. Where a sentence
    is short, lengths below 1 become 1; equal lengths are decoded but never chosen twice. The result
    for a sentence does not depend on the others in the batch.

    Args:
        learner: Model in evaluation mode.
        source: Tokens ``(B, S)``, padded on the right.
        lengths: Which lengths to decode, such as ``window(3)``.
        scorer: Chooses among them; None takes the first.
        words: From logits to tokens.
        longest: From source lengths ``(B,)`` to the most tokens of a translation.
        round_up: From the longest candidate to the width T of the batch, which then takes few
            different values; for compiled models.

    Returns:
        The translations, and all candidates.

    Raises:
        ValueError: There is no sentence.
    """
    if not len(source):
        raise ValueError("source: has no sentence")
    encoding = learner.encode(source)
    source_lengths = encoding.mask.sum(dim=1)
    wanted = lengths(
        learner.predict_length(encoding), learner.length, source_lengths, longest(source_lengths)
    )  # (B, G)
    # The one place where the host waits for the device: the width of the batch.
    size = round_up(int(wanted.max()))
    mask = length_mask(wanted.flatten(), size)  # (N, T)
    logits = learner.decode(encoding, mask)
    last = mask & ~F.pad(mask, (0, 1), value=False)[:, 1:]
    tokens = words(logits, last).masked_fill(~mask, PAD)
    candidates = tokens.view(*wanted.shape, -1)
    if scorer is None:
        return ParallelTranslation(candidates[:, 0], None, candidates, wanted, None)
    scores = scorer(Candidates(source, tokens, mask, logits)).view(wanted.shape)
    scores = scores.masked_fill(~first_of_equals(wanted), -torch.inf)
    best = scores.argmax(dim=1, keepdim=True)
    chosen = candidates.take_along_dim(best[:, :, None], dim=1).squeeze(1)
    return ParallelTranslation(
        chosen, scores.gather(1, best).squeeze(1), candidates, wanted, scores
    )


def own_scores(candidates: Candidates) -> Tensor:
    """Mean log-probability of each candidate's tokens by the learner itself, ``(N,)``."""
    return mean_log_prob(candidates.logits, candidates.tokens)


def teacher_scorer(teacher: Transformer) -> Scorer:
    """Let an autoregressive model choose."""
    return lambda candidates: teacher_scores(teacher, candidates.source, candidates.tokens)


@torch.inference_mode()
def teacher_scores(teacher: Transformer, source: Tensor, candidates: Tensor) -> Tensor:
    """Mean log-probability of each candidate's tokens, EOS counted, in one teacher-forced pass.

    Args:
        teacher: Autoregressive model in evaluation mode, which begins from EOS.
        source: Tokens ``(B, S)``, encoded once for all candidates of a sentence.
        candidates: Tokens ``(N, T)``, each ending in EOS and padded; ``N`` is a multiple of ``B``.

    Returns:
        ``(N,)``.
    """
    memory, mask = teacher.encode(source)
    shifted = F.pad(candidates, (1, -1), value=EOS)
    states = teacher.decoder(teacher.target(shifted), memory, memory_mask=mask)
    return mean_log_prob(teacher.output(states), candidates)


def mean_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the tokens of each row of their log-probabilities; ``(N, T, V)`` to ``(N,)``."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), tokens.flatten(), ignore_index=PAD, reduction="none"
    )
    return -losses.view(tokens.shape).sum(dim=1) / tokens.ne(PAD).sum(dim=1)


def collapse_repeats(tokens: Tensor) -> Tensor:
    """Remove every token that equals the one before it.

    Args:
        tokens: ``(N, T)``, padded on the right.

    Returns:
        ``(N, T)``, padded on the right.
    """
    before = F.pad(tokens, (1, -1), value=PAD)
    dropped = tokens == before
    order = dropped.byte().argsort(dim=1, stable=True)
    return tokens.masked_fill(dropped, PAD).gather(1, order)


def configured(
    config: ParallelDecodeConfig, *, teacher: Transformer | None = None, max_length: int
) -> Callable[[Learner, Tensor], ParallelTranslation]:
    """The decoding that ``config`` describes, as a function of a learner and a source.

    Args:
        config: Lengths, scorer and clean-up.
        teacher: Needed where it is the scorer.
        max_length: Positions of the model.

    Raises:
        ValueError: The teacher is missing.
    """
    if config.scorer == "teacher" and teacher is None:
        raise ValueError("parallel.scorer: teacher needs a teacher; give one, or use self or none")
    scorers = {"none": None, "self": own_scores, "teacher": teacher and teacher_scorer(teacher)}
    radius = 0 if config.scorer == "none" else config.radius
    lengths = {
        "window": window(radius),
        "top_k": most_likely if config.scorer == "none" else top_lengths(config.top_k),
        "source": source_window(radius, offset=config.offset),
    }
    decode = partial(
        parallel_decode,
        lengths=lengths[config.lengths],
        scorer=scorers[config.scorer],
        longest=lambda source_lengths: longest_output(source_lengths).clamp(max=max_length),
    )
    if not config.collapse:
        return decode

    def collapsed(learner: Learner, source: Tensor) -> ParallelTranslation:
        found = decode(learner, source)
        return found._replace(tokens=collapse_repeats(found.tokens))

    return collapsed
