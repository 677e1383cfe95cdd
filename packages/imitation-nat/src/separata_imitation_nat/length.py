"""The length of the target: a class for each difference to the length of the source.

Shapes: ``B`` sentences, ``G`` candidates, ``S`` source length, ``C`` classes, ``M`` model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FirstLength = Callable[[Tensor], Tensor]
"""From the lengths of sources ``(B,)`` to the target length that class 0 stands for."""

CLASSES = {128: (-128, 256), 20: (-20, 41)}
"""First difference and number of classes of ``ModelConfig.length_offset``."""


def length_difference(first: int) -> FirstLength:
    """Classes count from the source's length plus ``first``."""
    return lambda source_lengths: source_lengths + first


def absolute_length(source_lengths: Tensor) -> Tensor:
    """Classes are lengths, whatever the source."""
    return torch.zeros_like(source_lengths)


def unchanged(states: Tensor) -> Tensor:
    """The states as they are, with their gradient."""
    return states


class LengthHead(nn.Module):
    """Mean of the valid encoder states, then a linear layer without bias to classes.

    Args:
        width: Model width ``M``.
        num_classes: Classes ``C``.
        first_length: What class 0 stands for.
        read: Applied to the states first; ``Tensor.detach`` keeps the gradient from the encoder.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        first_length: FirstLength,
        read: Callable[[Tensor], Tensor] = unchanged,
    ) -> None:
        super().__init__()
        self.first_length = first_length
        self.read = read
        self.projection = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(B, C)`` from encoder states ``(B, S, M)`` and their mask ``(B, S)``."""
        real = mask[:, :, None].to(states.dtype)
        mean = (self.read(states) * real).sum(dim=1) / real.sum(dim=1)
        logits: Tensor = self.projection(mean)
        return logits

    def classes(self, source_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Class ``(B,)`` of each target length; lengths out of range take the nearest class."""
        numbers = target_lengths - self.first_length(source_lengths)
        return numbers.clamp(0, self.projection.out_features - 1)

    def lengths(self, classes: Tensor, source_lengths: Tensor) -> Tensor:
        """Lengths that ``classes (B, ...)`` stand for, of the same shape; they may be negative."""
        first = self.first_length(source_lengths)
        return classes + first.view(-1, *[1] * (classes.dim() - 1))


def length_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean negative log-likelihood of ``classes (B,)`` under ``logits (B, C)``."""
    return F.cross_entropy(logits.float(), classes)


def length_window(predicted: Tensor, size: int, *, least: int = 1) -> Tensor:
    """Lengths ``predicted - size // 2 .. `` of each sentence, at least ``least``.

    Args:
        predicted: ``(B,)``.
        size: Candidates ``G``; ``2 dT + 1`` is a window of radius dT.
        least: Shorter ones become this long.

    Returns:
        ``(B, G)``, ascending; equal lengths come from the lower end.
    """
    window = torch.arange(size, device=predicted.device) - size // 2
    return (predicted[:, None] + window).clamp(min=least)


def first_of_equals(lengths: Tensor) -> Tensor:
    """Say of ``lengths (B, G)`` which is the first of its value in its row, boolean."""
    same = lengths[:, :, None] == lengths[:, None, :]
    return ~same.tril(-1).any(dim=-1)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Boolean ``(N, size)``, True at the first ``lengths (N,)`` places of each row."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]
