"""Cross-modal retrieval: recall@k from one score matrix, in both directions.

Shapes: I images, C captions (any two kinds of items).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from separata_shared.metrics.score import Score


def retrieval_recall(
    scores: Tensor, relevant: Tensor, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Score]:
    """Share of queries with at least one relevant item among the k best, in percent.

    The rank of a query is that of its best relevant item, found by counting the irrelevant items
    that score at least as high: ties with an irrelevant item count against the model, and relevant
    items never push each other down. With one relevant item this is ``ranking.ranks`` with
    ``ties="worst"``.

    Args:
        scores: Score of each image with each caption, (I, C); higher is better.
        relevant: True where image and caption belong together, (I, C).
        ks: Values of k.

    Returns:
        ``caption_recall@k`` (query: image) and ``image_recall@k`` (query: caption) for each k, and
        ``recall_sum``, the sum of all of them.

    Raises:
        ValueError: Shapes differ, nothing to score, a score is NaN, or a query without any relevant
            item.
    """
    if scores.dim() != 2 or scores.shape != relevant.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)}: two matrices of "
            "one shape are needed, the second boolean"
        )
    if not scores.numel() or not ks or min(ks) < 1:
        raise ValueError("retrieval: nothing to score (no items, or no k of at least 1)")
    if scores.isnan().any():
        raise ValueError("scores: hold NaN")
    directions = {
        "caption": _ranks(scores, relevant),
        "image": _ranks(scores.T, relevant.T),
    }
    result: dict[str, Score] = {}
    for found, ranks in directions.items():
        for k in ks:
            value = 100 * (ranks <= k).double().mean().item()
            name = f"{found}_recall@{k}"
            result[name] = Score(value, "percent", f"{name}|ties:worst", ranks.numel())
    total = sum(score.value for score in result.values())
    signature = f"recall_sum|k:{','.join(map(str, ks))}|ties:worst"
    result["recall_sum"] = Score(total, "percent", signature, sum(scores.shape))
    return result


def _ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Rank of the best relevant item of each row, 1 is best."""
    if not relevant.any(dim=1).all():
        row = int(relevant.any(dim=1).int().argmin())
        raise ValueError(f"retrieval: query {row} has no relevant item")
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((scores >= best) & ~relevant).sum(dim=1)
