"""What the learner's decoder reads instead of the target: a copy of the source.

Indices i of source positions and j of target positions count from 0; S and T without an index are
padded lengths, S_b and T_b those of sentence b. Padding is on the right. Rows of the target are
candidates: ``N = B * G`` for ``G`` candidates of each sentence, those of a sentence together.

Shapes: ``B`` sentences, ``N`` candidates, ``T`` target length, ``S`` source length, ``M`` width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Weights = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``weights(source_mask (N, S), target_mask (N, T), scale)`` gives ``(N, T, S)``."""

INTERPOLATION_WIDTH = 0.3
"""Divisor of the squared distance in ``interpolation``."""


def soft_absolute(source_mask: Tensor, target_mask: Tensor, tau: Tensor) -> Tensor:
    """Soft copy of the paper: ``w_ij = softmax_i(-|i - j| / tau)`` over valid i.

    Args:
        source_mask: Boolean ``(N, S)``, True = real token; each row has one.
        target_mask: Boolean ``(N, T)``; only its size is used.
        tau: Positive number; towards 0 each j copies its nearest i, towards infinity their mean.

    Returns:
        Weights ``(N, T, S)``; rows sum to 1.
    """
    source, target = _positions(source_mask), _positions(target_mask)
    distance = (source - target[:, None]).abs()  # (T, S)
    # Softmax does not feel what is the same for all i. Taking the nearest distance away keeps the
    # row finite for any tau: j beyond the end of a sentence is far from all of it.
    last = source_mask.sum(dim=1, dtype=distance.dtype) - 1  # (N)
    nearest = (target - last[:, None]).clamp(min=0)  # (N, T)
    return _softmax((nearest[:, :, None] - distance) / tau, source_mask)


def soft_relative(source_mask: Tensor, target_mask: Tensor, temperature: Tensor) -> Tensor:
    """Soft copy by relative position: ``w_ij = softmax_i(-temperature |j / T_b - i / S_b|)``.

    Args:
        source_mask: Boolean ``(N, S)``, True = real token; each row has one.
        target_mask: Boolean ``(N, T)``; each row has a real position.
        temperature: Positive number; larger is sharper.

    Returns:
        Weights ``(N, T, S)``; rows sum to 1.
    """
    source, target = _relative(source_mask), _relative(target_mask)
    distance = (source[:, None, :] - target[:, :, None]).abs()
    return _softmax(-temperature * distance, source_mask)


def interpolation(source_mask: Tensor, target_mask: Tensor, width: Tensor) -> Tensor:
    """Weights ``w_ij = softmax_i(-(i - j S_b / T_b)^2 / width)``, a narrow Gaussian.

    Args:
        source_mask: Boolean ``(N, S)``, True = real token; each row has one.
        target_mask: Boolean ``(N, T)``; each row has a real position.
        width: Positive number.

    Returns:
        Weights ``(N, T, S)``; rows sum to 1.
    """
    lengths = source_mask.sum(dim=1, keepdim=True)
    centre = _relative(target_mask) * lengths  # (N, T)
    distance = _positions(source_mask) - centre[:, :, None]
    return _softmax(-distance.square() / width, source_mask)


def uniform_index(source_mask: Tensor, target_mask: Tensor) -> Tensor:
    """Source position ``round(j (S_b - 1) / (T_b - 1))`` of each target position, half to even.

    Args:
        source_mask: Boolean ``(N, S)``, True = real token; each row has one.
        target_mask: Boolean ``(N, T)``.

    Returns:
        Indices ``(N, T)``; 0 at padding and where ``T_b`` is 1.
    """
    steps = source_mask.sum(dim=1, keepdim=True) - 1
    places = (target_mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    j = torch.arange(target_mask.size(1), device=steps.device)
    # One division of whole numbers: a rounded step times j would miss some halves.
    return (j * steps / places).round().long().masked_fill(~target_mask, 0)


class SoftCopy(nn.Module):
    """``y_j = sum_i w_ij H_i`` with weights of one trained positive number.

    Args:
        weights: Function of both masks and that number, such as ``soft_absolute``.
        start: Its value before training.
    """

    def __init__(self, weights: Weights, *, start: float = 1.0) -> None:
        super().__init__()
        self.weights = weights
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self, states: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        """Copy ``states (B, S, M)`` to ``(N, T, M)``; masks ``(B, S)`` and ``(N, T)``."""
        groups = len(target_mask) // len(states)
        w = self.weights(
            source_mask.repeat_interleave(groups, dim=0), target_mask, self.log_scale.exp()
        )
        w = w.to(states.dtype).view(len(states), -1, states.size(1))  # (B, G * T, S)
        return (w @ states).view(*target_mask.shape, -1)


class UniformCopy(nn.Module):
    """One source position for each target position, evenly spread; nothing is trained."""

    def forward(self, states: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        """Copy ``states (B, S, M)`` to ``(N, T, M)``; masks ``(B, S)`` and ``(N, T)``."""
        groups = len(target_mask) // len(states)
        index = uniform_index(source_mask.repeat_interleave(groups, dim=0), target_mask)
        index = index.view(len(states), -1, 1).expand(-1, -1, states.size(2))
        return states.gather(1, index).view(*target_mask.shape, -1)


class ZeroCopy(nn.Module):
    """Nothing is copied: the decoder reads positions alone."""

    def forward(self, states: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        """Zeros ``(N, T, M)``."""
        return states.new_zeros(*target_mask.shape, states.size(2))


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.size(1), device=mask.device, dtype=torch.float32)


def _relative(mask: Tensor) -> Tensor:
    """Positions ``(N, L)`` divided by the length of each row."""
    return _positions(mask) / mask.sum(dim=1, keepdim=True)


def _softmax(scores: Tensor, source_mask: Tensor) -> Tensor:
    """Normalise ``scores (N, T, S)`` over the valid source positions."""
    return scores.masked_fill(~source_mask[:, None, :], -torch.inf).softmax(dim=-1)
