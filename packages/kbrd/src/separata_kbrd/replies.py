"""What the training and the scoring of answers have in common: the loss of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import FrozenRecommender
from .pairs import DialogBatch
from .words import NULL, START


@dataclass(frozen=True)
class ReplyLoss:
    """Negative log-likelihoods of a batch of answers, in nats."""

    total: Tensor
    """Sum over all tokens, ends included; a scalar with a gradient."""
    count: Tensor
    """Number of tokens."""
    slot_total: Tensor
    """Part of ``total`` that falls on item slots, detached."""
    slot_count: Tensor
    """Number of item slots."""


def reply_loss(logits: Tensor, ys: Tensor, *, slot: int) -> ReplyLoss:
    """Cross-entropy of answers.

    Args:
        logits: Scores of every token (B, T, V).
        ys: Answers and their ends (B, T), padded with 0.
        slot: The token that stands for an item.
    """
    nll = F.cross_entropy(
        logits.flatten(0, 1), ys.flatten(), ignore_index=NULL, reduction="none"
    ).view(ys.shape)
    slots = ys == slot
    return ReplyLoss(nll.sum(), ys.ne(NULL).sum(), (nll.detach() * slots).sum(), slots.sum())


def shifted(ys: Tensor) -> Tensor:
    """What the decoder reads to write ``ys`` (B, T): the start, then all but the last token."""
    return torch.cat((ys.new_full((len(ys), 1), START), ys[:, :-1]), dim=1)


def batch_loss(
    model: nn.Module, frozen: FrozenRecommender, batch: DialogBatch, *, slot: int
) -> ReplyLoss:
    """Loss of a batch; ``frozen`` gives the users, without gradient.

    Args:
        model: Called as ``model(context, written, user)``.
        frozen: The recommender.
        batch: Turn pairs.
        slot: The token that stands for an item.
    """
    with torch.no_grad():
        user, _ = frozen.users(batch.nodes, batch.mask)
    logits = model(batch.xs, shifted(batch.ys), user)
    return reply_loss(logits.float(), batch.ys, slot=slot)
