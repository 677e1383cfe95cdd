"""Batched beam search.

Shapes: ``B`` sentences still searched, ``K`` beams of each, ``N = B * K`` rows, ``V`` vocabulary,
``t`` tokens so far.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from separata_shared.decoding.step import StateT, Step, check_lengths

LengthPenalty = Callable[[int], float]
"""Divides the summed log-probability of a hypothesis, given its length with EOS."""

Constrain = Callable[[Tensor, Tensor], Tensor]
"""``constrain(log_probs (N, V), tokens (N, t))`` gives the log-probabilities to search with."""

Limit = Callable[[Tensor, Tensor, int], Tensor]
"""``limit(totals (N, V), at_limit (N,), eos_index)`` gives the totals to choose from; called where
sentences have reached their maximum length, which the boolean ``at_limit`` says of each row."""

Enough = Callable[[int, bool], bool]
"""``enough(finished, best_ended)``: whether a sentence with so many finished hypotheses is done,
given whether an end has ever been its best continuation."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One finished sequence."""

    tokens: Tensor
    """``(L,)`` int64 on the CPU, ending in EOS."""
    score: float
    """Summed log-probability divided by the length penalty."""
    positional_scores: Tensor
    """``(L,)`` on the CPU, the log-probability of each token; float32 or wider."""


def power_penalty(alpha: float) -> LengthPenalty:
    """``length^alpha``, as in fairseq; 1 gives the mean log-probability, 0 the sum."""
    return lambda length: float(length) ** alpha


def gnmt_penalty(alpha: float) -> LengthPenalty:
    """``((5 + length) / 6)^alpha`` (Wu et al. 2016, Eq. 14), as in tensor2tensor."""
    return lambda length: ((5.0 + length) / 6.0) ** alpha


def only_ends(totals: Tensor, at_limit: Tensor, eos_index: int) -> Tensor:
    """A ``Limit`` that leaves nothing but EOS to the rows at their limit."""
    others = torch.arange(totals.size(1), device=totals.device) != eos_index
    return totals.masked_fill(at_limit[:, None] & others, -torch.inf)


def any_token(totals: Tensor, at_limit: Tensor, eos_index: int) -> Tensor:
    """A ``Limit`` that changes nothing: what has not ended by then never does."""
    return totals


@torch.no_grad()
def beam_search(
    step: Step[StateT],
    state: StateT,
    first_tokens: Tensor,
    *,
    beam_size: int,
    max_lengths: Sequence[int],
    eos_index: int,
    padding_index: int | None,
    min_length: int = 1,
    length_penalty: LengthPenalty | None = None,
    constrain: Constrain | None = None,
    candidates_per_beam: int = 2,
    limit: Limit = only_ends,
    enough: Enough | None = None,
) -> list[list[Hypothesis]]:
    """Search the best continuations of each sentence, by default by the rules of fairseq 0.9.

    Each step takes the ``2 * beam_size`` best continuations of a sentence. Those among the first
    ``beam_size`` that end in EOS are finished; the best ``beam_size`` that do not end in EOS go on.
    A sentence stops when it has ``beam_size`` finished hypotheses, and leaves the batch; at its
    maximum length only EOS is allowed. Padding is never generated. The result for a sentence does
    not depend on the others in the batch.

    The last three arguments make other searches of it. With one candidate per beam a finished
    hypothesis keeps its place for one step, has no continuation, and narrows the beam for that
    step, as in OpenNMT and ParlAI. A sentence that reaches its limit without a finished hypothesis
    gets its best continuation with the last token replaced by EOS, the score left as it is.

    Args:
        step: Called with one row per sentence first, then with ``beam_size`` rows per sentence.
        state: Handed to ``step``.
        first_tokens: ``(B,)`` what the decoder reads first, such as EOS; not part of the results.
        beam_size: Beams, and hypotheses wanted, per sentence.
        max_lengths: Most tokens per sentence, EOS not counted.
        eos_index: Token that ends a sequence.
        padding_index: Token that is never generated; None for no such token.
        min_length: Fewest tokens, EOS not counted.
        length_penalty: Divisor of the score; None for ``power_penalty(1.0)``.
        constrain: Changes the log-probabilities before each selection.
        candidates_per_beam: Continuations looked at for each beam, 1 or 2.
        limit: What sentences at their maximum length may choose from.
        enough: Whether a sentence is done; None for: it has ``beam_size`` finished hypotheses.

    Returns:
        For each sentence its hypotheses, best first: those finished until there were enough.

    Raises:
        ValueError: ``beam_size`` is below 1, ``candidates_per_beam`` is not 1 or 2, or
            ``max_lengths`` does not fit.
    """
    _check_sizes(beam_size, candidates_per_beam)
    check_lengths(first_tokens, max_lengths, min_length)
    results = _Results(max_lengths, enough or (lambda finished, _: finished >= beam_size))
    length_penalty = power_penalty(1.0) if length_penalty is None else length_penalty
    sentences = list(range(len(max_lengths)))  # those still searched
    limits = torch.tensor(max_lengths, device=first_tokens.device)
    tokens = first_tokens.new_empty(len(sentences), 0)  # (N, t)
    sums = torch.zeros(
        len(sentences), 1, device=first_tokens.device
    )  # (N, t + 1) log p of each prefix
    last = first_tokens

    for t in range(max(max_lengths, default=-1) + 1):
        logits = step(last, state)
        log_probs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float)), dim=-1)
        if constrain is not None:
            log_probs = constrain(log_probs, tokens)
        totals = log_probs + sums[:, -1:]
        if padding_index is not None:
            totals[:, padding_index] = -torch.inf
        if t < min_length:
            totals[:, eos_index] = -torch.inf
        if candidates_per_beam == 1 and t:
            totals.masked_fill_((last == eos_index)[:, None], -torch.inf)
        if t >= min(max_lengths):
            at_limit = (limits == t).repeat_interleave(len(totals) // len(sentences))
            totals = limit(totals, at_limit, eos_index)
        wanted = candidates_per_beam * beam_size
        scores, parents, choices = _candidates(totals, len(sentences), wanted)
        is_end = (choices == eos_index) & (scores > -torch.inf)
        ends = is_end[:, :beam_size].cpu().nonzero()  # the one synchronisation of each step
        finish = partial(_finish, tokens, sums, penalty=length_penalty(t + 1), eos_index=eos_index)
        if len(ends):
            rows, ranks = ends.to(choices.device).unbind(1)
            ended = finish(parents[rows, ranks], scores[rows, ranks])
            for (row, rank), hypothesis in zip(ends.tolist(), ended, strict=True):
                results.add(sentences[row], hypothesis, is_best=rank == 0)
        for row in range(len(sentences)):
            if t == max_lengths[sentences[row]] and not results.found[sentences[row]]:
                results.found[sentences[row]] = finish(parents[row, :1], scores[row, :1])
        going = [row for row, each in enumerate(sentences) if results.go_on(each, t)]
        if not going:
            break
        # A stable sort puts the continuations that are no end first, best first.
        order = is_end.byte().argsort(dim=1, stable=True)[:, :beam_size]
        keep = None
        if len(going) < len(sentences):
            keep = torch.tensor(going, device=first_tokens.device)
            sentences = [sentences[row] for row in going]
            kept = (limits, order, scores, parents, choices)
            limits, order, scores, parents, choices = (tensor[keep] for tensor in kept)
        index = parents.gather(1, order).flatten()
        last = choices.gather(1, order).flatten()
        tokens = torch.cat((tokens[index], last[:, None]), dim=1)
        sums = torch.cat((sums[index], scores.gather(1, order).view(-1, 1)), dim=1)
        state.reorder(index, keep)

    return [sorted(each, key=lambda hypothesis: -hypothesis.score) for each in results.found]


def _check_sizes(beam_size: int, candidates_per_beam: int) -> None:
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, not {beam_size}")
    if candidates_per_beam not in (1, 2):
        raise ValueError(f"candidates_per_beam must be 1 or 2, not {candidates_per_beam}")


class _Results:
    """Finished hypotheses of each sentence, as long as it has not enough of them."""

    def __init__(self, max_lengths: Sequence[int], enough: Enough) -> None:
        self.found: list[list[Hypothesis]] = [[] for _ in max_lengths]
        self._best_ended = [False] * len(max_lengths)
        self._max_lengths = max_lengths
        self._enough = enough

    def want(self, sentence: int) -> bool:
        return not self._enough(len(self.found[sentence]), self._best_ended[sentence])

    def go_on(self, sentence: int, t: int) -> bool:
        return t < self._max_lengths[sentence] and self.want(sentence)

    def add(self, sentence: int, hypothesis: Hypothesis, *, is_best: bool) -> None:
        if self.want(sentence):
            self.found[sentence].append(hypothesis)
        self._best_ended[sentence] |= is_best


def _candidates(totals: Tensor, num_sentences: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best continuations of each sentence.

    Args:
        totals: ``(N, V)`` summed log-probabilities of all continuations.
        num_sentences: ``B``.
        wanted: Continuations of each sentence.

    Returns:
        Scores, rows continued (of the ``N``) and tokens, each ``(B, wanted)``, best first.
        Where there are fewer continuations the rest scores ``-inf``.
    """
    num_tokens = totals.size(1)
    flat = totals.view(num_sentences, -1)  # (B, K * V)
    scores, places = flat.topk(min(wanted, flat.size(1)))
    missing = (0, wanted - scores.size(1))
    scores, places = F.pad(scores, missing, value=-torch.inf), F.pad(places, missing)
    num_beams = totals.size(0) // num_sentences
    first_rows = torch.arange(0, totals.size(0), num_beams, device=totals.device)
    parents = places // num_tokens + first_rows[:, None]
    return scores, parents, places % num_tokens


def _finish(
    tokens: Tensor,
    sums: Tensor,
    parents: Tensor,
    scores: Tensor,
    *,
    penalty: float,
    eos_index: int,
) -> list[Hypothesis]:
    """Make hypotheses of rows and the scores with which they end; an impossible one is left out.

    Args:
        tokens: ``(N, t)`` tokens of all rows.
        sums: ``(N, t + 1)`` summed log-probabilities of their prefixes.
        parents: ``(n,)`` rows that end.
        scores: ``(n,)`` summed log-probabilities with the end.
        penalty: Divisor of the scores.
        eos_index: Token that ends them.
    """
    sequences = F.pad(tokens[parents], (0, 1), value=eos_index).cpu()
    sums = torch.cat((sums[parents], scores[:, None]), dim=1).cpu()
    return [
        Hypothesis(tokens=sequence, score=score / penalty, positional_scores=steps)
        for sequence, score, steps in zip(
            sequences.unbind(), sums[:, -1].tolist(), sums.diff(dim=1).unbind(), strict=True
        )
        if score > -math.inf
    ]
