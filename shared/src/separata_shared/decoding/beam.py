"""Batched beam search.

Shapes: ``B`` sentences still searched, ``K`` beams of each, ``N = B * K`` rows, ``V`` vocabulary,
``t`` tokens so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from separata_shared.decoding.step import StateT, Step, check_lengths

LengthPenalty = Callable[[int], float]
"""Divides the summed log-probability of a hypothesis, given its length with EOS."""

Constrain = Callable[[Tensor, Tensor], Tensor]
"""``constrain(log_probs (N, V), tokens (N, t))`` gives the log-probabilities to search with."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One finished sequence."""

    tokens: Tensor
    """``(L,)`` int64 on the CPU, ending in EOS."""
    score: float
    """Summed log-probability divided by the length penalty."""
    positional_scores: Tensor
    """``(L,)`` float32 on the CPU, the log-probability of each token."""


def power_penalty(alpha: float) -> LengthPenalty:
    """``length^alpha``, as in fairseq; 1 gives the mean log-probability, 0 the sum."""
    return lambda length: float(length) ** alpha


def gnmt_penalty(alpha: float) -> LengthPenalty:
    """``((5 + length) / 6)^alpha`` (Wu et al. 2016, Eq. 14), as in tensor2tensor."""
    return lambda length: ((5.0 + length) / 6.0) ** alpha


@torch.no_grad()
def beam_search(
    step: Step[StateT],
    state: StateT,
    first_tokens: Tensor,
    *,
    beam_size: int,
    max_lengths: Sequence[int],
    eos_index: int,
    padding_index: int,
    min_length: int = 1,
    length_penalty: LengthPenalty | None = None,
    constrain: Constrain | None = None,
) -> list[list[Hypothesis]]:
    """Search the best continuations of each sentence, by the rules of fairseq 0.9.

    Each step takes the ``2 * beam_size`` best continuations of a sentence. Those among the first
    ``beam_size`` that end in EOS are finished; the best ``beam_size`` that do not end in EOS go on.
    A sentence stops when it has ``beam_size`` finished hypotheses, and leaves the batch; at its
    maximum length only EOS is allowed. Padding is never generated. The result for a sentence does
    not depend on the others in the batch.

    Args:
        step: Called with one row per sentence first, then with ``beam_size`` rows per sentence.
        state: Handed to ``step``.
        first_tokens: ``(B,)`` what the decoder reads first, such as EOS; not part of the results.
        beam_size: Beams, and hypotheses wanted, per sentence.
        max_lengths: Most tokens per sentence, EOS not counted.
        eos_index: Token that ends a sequence.
        padding_index: Token that is never generated.
        min_length: Fewest tokens, EOS not counted.
        length_penalty: Divisor of the score; None for ``power_penalty(1.0)``.
        constrain: Changes the log-probabilities before each selection.

    Returns:
        For each sentence at most ``beam_size`` hypotheses, best first.

    Raises:
        ValueError: ``beam_size`` is below 1 or ``max_lengths`` does not fit.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, not {beam_size}")
    check_lengths(first_tokens, max_lengths, min_length)
    length_penalty = power_penalty(1.0) if length_penalty is None else length_penalty
    device = first_tokens.device
    found: list[list[Hypothesis]] = [[] for _ in max_lengths]
    sentences = list(range(len(max_lengths)))  # those still searched
    limits = torch.tensor(max_lengths, device=device)
    tokens = first_tokens.new_empty(len(sentences), 0)  # (N, t)
    sums = torch.zeros(len(sentences), 1, device=device)  # (N, t + 1) log p of each prefix
    last = first_tokens

    for t in range(max(max_lengths, default=-1) + 1):
        log_probs = F.log_softmax(step(last, state).float(), dim=-1)
        if constrain is not None:
            log_probs = constrain(log_probs, tokens)
        totals = log_probs + sums[:, -1:]
        totals[:, padding_index] = -torch.inf
        if t < min_length:
            totals[:, eos_index] = -torch.inf
        if t >= min(max_lengths):
            _force(totals, limits == t, eos_index)
        scores, parents, choices = _candidates(totals, limits.numel(), beam_size)

        is_end = (choices == eos_index) & (scores > -torch.inf)
        ends = is_end[:, :beam_size].cpu().nonzero()  # the one synchronisation of each step
        if len(ends):
            rows, ranks = ends.to(device).unbind(1)
            ended = parents[rows, ranks]
            hypotheses = _finish(
                torch.cat((tokens[ended], choices[rows, ranks, None]), dim=1),
                torch.cat((sums[ended], scores[rows, ranks, None]), dim=1),
                length_penalty(t + 1),
            )
            for row, hypothesis in zip(ends[:, 0].tolist(), hypotheses, strict=True):
                if len(found[sentences[row]]) < beam_size:
                    found[sentences[row]].append(hypothesis)

        going = [
            row
            for row, sentence in enumerate(sentences)
            if len(found[sentence]) < beam_size and t < max_lengths[sentence]
        ]
        if not going:
            break
        # A stable sort puts the continuations that are no end first, best first.
        order = is_end.byte().argsort(dim=1, stable=True)[:, :beam_size]
        keep = None
        if len(going) < len(sentences):
            keep = torch.tensor(going, device=device)
            sentences = [sentences[row] for row in going]
            limits, order = limits[keep], order[keep]
            scores, parents, choices = scores[keep], parents[keep], choices[keep]
        index = parents.gather(1, order).flatten()
        last = choices.gather(1, order).flatten()
        tokens = torch.cat((tokens[index], last[:, None]), dim=1)
        sums = torch.cat((sums[index], scores.gather(1, order).view(-1, 1)), dim=1)
        state.reorder(index, keep)

    return [sorted(each, key=lambda hypothesis: -hypothesis.score) for each in found]


def _force(totals: Tensor, at_limit: Tensor, eos_index: int) -> None:
    """Leave only EOS to the rows ``(N, V)`` of the sentences ``(B,)`` at their limit, in place."""
    forced = at_limit.repeat_interleave(totals.size(0) // at_limit.numel())
    others = torch.arange(totals.size(1), device=totals.device) != eos_index
    totals.masked_fill_(forced[:, None] & others, -torch.inf)


def _candidates(
    totals: Tensor, num_sentences: int, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best continuations of each sentence.

    Args:
        totals: ``(N, V)`` summed log-probabilities of all continuations.
        num_sentences: ``B``.
        beam_size: Beams of a sentence from the next step on.

    Returns:
        Scores, rows continued (of the ``N``) and tokens, each ``(B, 2 * beam_size)``, best first.
        Where there are fewer continuations the rest scores ``-inf``.
    """
    num_tokens = totals.size(1)
    flat = totals.view(num_sentences, -1)  # (B, K * V)
    wanted = 2 * beam_size
    scores, places = flat.topk(min(wanted, flat.size(1)))
    missing = (0, wanted - scores.size(1))
    scores, places = F.pad(scores, missing, value=-torch.inf), F.pad(places, missing)
    num_beams = totals.size(0) // num_sentences
    first_rows = torch.arange(0, totals.size(0), num_beams, device=totals.device)
    parents = places // num_tokens + first_rows[:, None]
    return scores, parents, places % num_tokens


def _finish(tokens: Tensor, sums: Tensor, penalty: float) -> list[Hypothesis]:
    """Make hypotheses of tokens ``(n, t + 1)`` and summed log-probabilities ``(n, t + 2)``."""
    tokens, sums = tokens.cpu(), sums.cpu()
    return [
        Hypothesis(tokens=sequence, score=score, positional_scores=steps)
        for sequence, score, steps in zip(
            tokens.unbind(),
            (sums[:, -1] / penalty).tolist(),
            sums.diff(dim=1).unbind(),
            strict=True,
        )
    ]
