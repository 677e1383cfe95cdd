"""Ranking metrics, with ranks found by counting instead of sorting.

Shapes: N queries, C candidates.
"""

from typing import Literal

import torch
from torch import Tensor

from separata_shared.metrics.score import Score

Ties = Literal["worst", "best", "mean"]


def ranks(scores: Tensor, targets: Tensor, *, ties: Ties = "worst") -> Tensor:
    """Rank of each query's target among all candidates; 1 is best.

    rank = 1 + #{c : s_c > s_target}, plus the other candidates equal to the target (``worst``),
    none of them (``best``) or half of them (``mean``). With ``worst``, a model that gives every
    candidate the same score gains nothing by it.

    Args:
        scores: Shape (N, C); higher is better. -inf excludes a candidate.
        targets: Number of the right candidate of each query, (N), int64.
        ties: How candidates that equal the target are counted.

    Returns:
        Ranks, shape (N), float64.

    Raises:
        ValueError: Shapes or numbers do not fit, a score is NaN, or ``ties`` is unknown.
    """
    if scores.dim() != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)}: "
            "(N, C) and (N) are needed"
        )
    if scores.isnan().any():
        raise ValueError("scores: hold NaN")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < scores.shape[1]:
        raise ValueError(f"targets: lie outside the {scores.shape[1]} candidates")
    share = {"worst": 1.0, "best": 0.0, "mean": 0.5}
    if ties not in share:
        raise ValueError(f"ties: {ties!r} is none of {', '.join(share)}")
    own = scores.gather(1, targets[:, None])
    higher = (scores > own).sum(dim=1)
    equal = (scores == own).sum(dim=1) - 1
    return 1 + higher.double() + share[ties] * equal.double()


def recall_at_k(ranks: Tensor, k: int) -> Score:
    """Share of queries whose target has rank k or better, in percent.

    Raises:
        ValueError: There is no query, or ``k`` is not positive.
    """
    if k < 1:
        raise ValueError(f"recall@k: k must be at least 1, got {k}")
    _not_empty(ranks, f"recall@{k}")
    value = 100 * (ranks <= k).double().mean().item()
    return Score(value, "percent", f"recall@{k}", ranks.numel())


def mean_reciprocal_rank(ranks: Tensor) -> Score:
    """Mean of 1 / rank over the queries.

    Raises:
        ValueError: There is no query.
    """
    _not_empty(ranks, "MRR")
    return Score(ranks.double().reciprocal().mean().item(), "fraction", "MRR", ranks.numel())


def _not_empty(ranks: Tensor, name: str) -> None:
    if not ranks.numel():
        raise ValueError(f"{name}: nothing to score")
    if torch.any(ranks < 1):
        raise ValueError(f"{name}: ranks begin at 1")
