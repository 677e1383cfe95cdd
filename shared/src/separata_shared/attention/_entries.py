"""Gradients of kept scores, given entry by entry, in the shape of what was added to the scores."""

import torch
from torch import Tensor


def bias_gradient(
    grad_scores: Tensor, bias: Tensor, shape: tuple[int, int, int, int], rows: Tensor, keys: Tensor
) -> Tensor:
    """Add the gradients of the entries into the shape of the bias.

    Args:
        grad_scores: Of each kept score, ``(N,)``.
        bias: Broadcastable to ``(B, H, T, S)``.
        shape: ``(B, H, T, S)``.
        rows: Query row of each entry, counted through ``B H T``, ``(N,)``.
        keys: Key of each entry, below ``S``, ``(N,)``.

    Returns:
        Shape and dtype of ``bias``.
    """
    _, num_heads, target, _ = shape
    places = torch.arange(bias.numel(), device=bias.device).view(bias.shape).expand(shape)
    r = rows.long()
    index = places[r // (num_heads * target), r // target % num_heads, r % target, keys.long()]
    total = grad_scores.new_zeros(bias.numel()).index_add_(0, index, grad_scores)
    return total.view(bias.shape).to(bias.dtype)
