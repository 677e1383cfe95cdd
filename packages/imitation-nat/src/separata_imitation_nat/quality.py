"""Numbers about translations beside BLEU, and how sure a difference in BLEU is.

Shapes: ``N`` sentences, ``L`` layers with actions, ``K`` actions, ``R`` resamples, ``S`` runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.metrics import Score, bleu
from torch import Tensor

BUCKETS = (10, 20, 30, 40, 50)
"""Upper ends of the length buckets, in source tokens; one more bucket takes the rest."""


def collapse(tokens: Sequence[int]) -> list[int]:
    """The tokens without those that repeat the one before.

    >>> collapse([5, 5, 7, 5, 5, 5])
    [5, 7, 5]
    """
    return [token for place, token in enumerate(tokens) if not place or token != tokens[place - 1]]


def repeated_tokens(translations: Iterable[Sequence[int]]) -> Score:
    """Share of tokens that are equal to the token before them, in percent.

    Raises:
        ValueError: There are no tokens.
    """
    rows = [list(row) for row in translations]
    repeated = sum(a == b for row in rows for a, b in pairwise(row))
    tokens = sum(map(len, rows))
    return Score(100 * repeated / max(tokens, 1), "percent", "token equals the one before", tokens)


def length_accuracy(predicted: Sequence[int], true: Sequence[int], within: int) -> Score:
    """Share of lengths that are at most ``within`` tokens off, in percent."""
    near = np.abs(np.asarray(predicted) - np.asarray(true)) <= within
    return Score(100 * float(near.mean()), "percent", f"|T^ - T| <= {within}", len(near))


def bleu_by_length(
    hypotheses: Sequence[str], references: Sequence[str], lengths: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """BLEU of the sentences of each bucket of source lengths; empty buckets are left out.

    Args:
        hypotheses: Translation of each sentence.
        references: Reference of each sentence.
        lengths: Tokens of each source sentence, end mark included.

    Returns:
        Scores by bucket, such as ``11-20`` or ``51-``.
    """
    place = np.searchsorted(BUCKETS, np.asarray(lengths))
    scores = {}
    for bucket in sorted(set(place.tolist())):
        chosen = np.flatnonzero(place == bucket).tolist()
        low = BUCKETS[bucket - 1] + 1 if bucket else 1
        high = BUCKETS[bucket] if bucket < len(BUCKETS) else ""
        score = bleu([hypotheses[n] for n in chosen], [references[n] for n in chosen])
        scores[f"{low}-{high}"] = score.as_dict()
    return scores


class ActionUse:
    """Mean action distribution of every layer, and which actions are ever the most likely one."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._used: Tensor | None = None
        self._count = 0

    def add(self, pi: Tensor, real: Tensor) -> None:
        """Take in distributions ``pi (L, B, T, K)`` at the positions where ``real (B, T)``."""
        chosen = pi[:, real].double()  # (L, n, K)
        best = torch.zeros(chosen.size(0), chosen.size(2), dtype=torch.bool, device=pi.device)
        best.scatter_(1, chosen.argmax(dim=-1), True)
        total = chosen.sum(dim=1)
        self._sum = total if self._sum is None else self._sum + total
        self._used = best if self._used is None else self._used | best
        self._count += chosen.size(1)

    def result(self) -> list[dict[str, float | int]]:
        """For each layer the perplexity exp(H(mean pi)) and the number of actions used."""
        if self._sum is None or self._used is None:
            return []
        mean = self._sum / self._count
        perplexity = torch.special.entr(mean).sum(dim=-1).exp().tolist()
        used = self._used.sum(dim=-1).tolist()
        return [
            {"perplexity": value, "used": number, "actions": mean.size(1)}
            for value, number in zip(perplexity, used, strict=True)
        ]


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """What corpus BLEU is a function of the sum of, for each sentence.

    Returns:
        Matches of 1 to 4 tokens, their totals, and the lengths of both sides: ``(N, 10)``.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(smooth_method="none", effective_order=True)
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        score = metric.sentence_score(hypothesis, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.asarray(rows, dtype=np.int64)


def bleu_of(statistics: NDArray[np.int64]) -> float:
    """Detokenised corpus BLEU in percent from summed statistics ``(10)``."""
    from sacrebleu.metrics.bleu import BLEU

    matches, totals = statistics[:4].tolist(), statistics[4:8].tolist()
    hypothesis_length, reference_length = statistics[8:].tolist()
    score = BLEU.compute_bleu(
        matches, totals, hypothesis_length, reference_length, smooth_method="exp"
    )
    return float(score.score)


def paired_bootstrap(
    systems: Mapping[str, Sequence[Sequence[str]]],
    references: Sequence[str],
    *,
    baseline: str,
    samples: int = 1000,
    seed: int = 1,
) -> dict[str, dict[str, Any]]:
    """Confidence intervals of detokenised BLEU and of its difference to a baseline.

    Paired bootstrap (Koehn 2004): all systems are scored on the same resamples of the sentences.
    The score of a system is the mean over its runs. Their texts are not joined: a run of short
    translations and one of long ones would be spared the brevity penalty.

    Args:
        systems: By the name of the system, the translations of each of its ``S`` runs, one for each
            seed for example, in the order of ``references``.
        references: Reference of each sentence.
        baseline: Name of the system that the others are compared with.
        samples: Resamples ``R``.
        seed: Seed of the resampling.

    Returns:
        For each system ``bleu``, ``interval`` (2.5 and 97.5 percent), ``difference`` and
        ``difference_interval``; and ``p``, twice the smaller share of resamples on one side of 0,
        at least 1 / ``samples``.
    """
    random = np.random.default_rng(seed)
    number = len(references)
    statistics = {
        name: np.stack([bleu_statistics(run, references) for run in runs])  # (S, N, 10)
        for name, runs in systems.items()
    }
    values = {name: _mean_bleu(rows.sum(axis=1)) for name, rows in statistics.items()}
    scores = {name: np.empty(samples) for name in systems}
    for sample in range(samples):
        weights = np.bincount(random.integers(number, size=number), minlength=number)  # (N)
        for name, rows in statistics.items():
            scores[name][sample] = _mean_bleu(weights @ rows)
    results = {}
    for name, found in scores.items():
        difference = found - scores[baseline]
        sides = min(float((difference <= 0).mean()), float((difference >= 0).mean()))
        results[name] = {
            "bleu": values[name],
            "interval": _interval(found),
            "difference": values[name] - values[baseline],
            "difference_interval": _interval(difference),
            "p": min(1.0, max(2 * sides, 1 / samples)),
        }
    return results


def _mean_bleu(statistics: NDArray[np.int64]) -> float:
    """Mean over the runs of their corpus BLEU from summed statistics ``(S, 10)``."""
    return float(np.mean([bleu_of(row) for row in statistics]))


def _interval(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]
