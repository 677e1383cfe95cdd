"""Instances through recommenders: the loss of a batch, ranks of the films named, and recall.

A recommender is here a function from a batch to scores of all nodes, (U, N).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from separata_shared.metrics import ranks, recall_at_k
from separata_shared.training import Loss
from torch import Tensor, nn

from .model import AutoRec, recommendation_loss
from .pairs import RecommenderBatch

KS = (1, 10, 50)
Scorer = Callable[[RecommenderBatch], Tensor]


class Ranked(NamedTuple):
    """What is known of each instance after ranking, (I) each."""

    rank: Tensor
    """Rank of the target among the items, from 1."""
    turn: Tensor
    """Number of its pair in the dialog, from 1."""
    context: Tensor
    """Mentions of items before the answer. The authors' code calls this the turn."""
    new: Tensor
    """Whether the target was not mentioned before."""


def recommendation_step(model: nn.Module, batch: RecommenderBatch) -> Loss:
    """Cross-entropy over all nodes, summed over the instances of a batch."""
    scores: Tensor = model(batch.nodes, batch.mask)
    return instance_loss(scores, batch)


def autorec_step(model: nn.Module, batch: RecommenderBatch) -> Loss:
    """As ``recommendation_step``, for the autoencoder, which sees the items of the context only."""
    decoder = model.get_submodule("decoder")
    assert isinstance(decoder, nn.Linear)
    scores: Tensor = model(multi_hot(batch.context, decoder.out_features))
    return instance_loss(scores, batch)


def instance_loss(scores: Tensor, batch: RecommenderBatch) -> Loss:
    """The loss of a batch with these scores."""
    total = recommendation_loss(scores.float(), batch.row, batch.target)
    return Loss(total=total, count=torch.tensor(len(batch.target), device=scores.device))


def multi_hot(nodes: Tensor, size: int) -> Tensor:
    """Ones where a node is listed, (U, size); -1 is no node."""
    ones = (nodes >= 0).float()
    return nodes.new_zeros(len(nodes), size, dtype=ones.dtype).scatter_reduce(
        1, nodes.clamp(min=0), ones, "amax"
    )


def autorec_scorer(model: AutoRec) -> Scorer:
    """The autoencoder as a recommender."""

    def scores(batch: RecommenderBatch) -> Tensor:
        x = multi_hot(batch.context, model.decoder.out_features)
        found: Tensor = model(x.to(model.decoder.weight.device))
        return found

    return scores


def popularity(targets: Iterable[Tensor], num_nodes: int) -> Scorer:
    """Recommend to everybody what training recommends most often.

    Args:
        targets: Targets of the training part.
        num_nodes: N.
    """
    counts = torch.zeros(num_nodes)
    for target in targets:
        counts += target.bincount(minlength=num_nodes)
    return lambda batch: counts.expand(len(batch.nodes), -1)


def repetition(num_nodes: int) -> Scorer:
    """Recommend the items of the context again, the latest first, and nothing else.

    Args:
        num_nodes: N.
    """

    def scores(batch: RecommenderBatch) -> Tensor:
        place = torch.arange(1, batch.context.shape[1] + 1).expand(batch.context.shape)
        place = place.masked_fill(batch.context < 0, 0).float()
        empty = torch.zeros(len(batch.context), num_nodes)
        return empty.scatter_reduce(1, batch.context.clamp(min=0), place, "amax")

    return scores


@torch.no_grad()
def rank_instances(
    score: Scorer, batches: Iterable[RecommenderBatch], items: Tensor
) -> tuple[Ranked, float]:
    """Rank the target of each instance among the items; other nodes do not count.

    An item that scores the same as the target stands before it.

    Args:
        score: The recommender.
        batches: Turns and their instances.
        items: Nodes that can be recommended, (M).

    Returns:
        The instances in order, and their mean cross-entropy over all nodes.

    Raises:
        ValueError: A target is no item, a score is not a number, or there is no instance.
    """
    found: list[Ranked] = []
    loss = 0.0
    for batch in batches:
        scores = score(batch).float().cpu()
        loss += float(recommendation_loss(scores, batch.row, batch.target))
        place, known = (items == batch.target[:, None]).max(dim=1).indices, batch.target
        if not torch.equal(items[place], known):
            raise ValueError("a target is not among the items")
        found.append(
            Ranked(
                rank=ranks(scores[:, items][batch.row], place),
                turn=batch.turn,
                context=(batch.context >= 0).sum(dim=1)[batch.row],
                new=~(batch.context[batch.row] == known[:, None]).any(dim=1),
            )
        )
    if not found:
        raise ValueError("no answer of this part names an item: nothing to rank")
    ranked = Ranked(*(torch.cat(column) for column in zip(*found, strict=True)))
    return ranked, loss / len(ranked.rank)


def recalls(rank: Tensor, groups: Mapping[str, Tensor]) -> dict[str, Any]:
    """Recall@1, @10 and @50 in percent, over all instances and by group.

    Args:
        rank: Rank of each instance's target, (I).
        groups: Numbers that put the instances into groups, (I), by the name of the grouping.

    Returns:
        ``all``, and for each grouping ``by_NAME`` with the recalls of each number; each is the
        value, how it was computed and the number of instances.

    Raises:
        ValueError: There is no instance.
    """
    result: dict[str, Any] = {"all": _recalls(rank)}
    for name, group in groups.items():
        result[f"by_{name}"] = {
            str(number): _recalls(rank[group == number]) for number in torch.unique(group).tolist()
        }
    return result


def report(ranked: Ranked) -> dict[str, Any]:
    """Recall over all instances, by turn and by context, and over what was not mentioned before."""
    found = recalls(ranked.rank, {"turn": ranked.turn, "context": ranked.context})
    if ranked.new.any():
        found["new"] = _recalls(ranked.rank[ranked.new])
    return found


def _recalls(rank: Tensor) -> dict[str, Any]:
    return {f"recall@{k}": recall_at_k(rank, k).as_dict() for k in KS}
