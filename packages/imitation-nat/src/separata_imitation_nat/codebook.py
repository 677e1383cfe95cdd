"""A codebook that follows the states assigned to its entries as a moving average.

The vector quantiser of van den Oord et al. 2017, appendix A.1, in the form of current libraries.
Shapes: ``K`` entries, ``M`` width.
"""

import torch
from torch import Tensor, nn

from .processes import add_up


class EMACodebook(nn.Module):
    """Nearest entry of each state, with moving averages instead of a gradient.

    An update in training counts the states of each entry and sums them; with the averages n of the
    counts and m of the sums,

        n <- d n + (1 - d) count,  m <- d m + (1 - d) sum,
        A_k = m_k / n'_k,  n'_k = (n_k + eps) / (sum(n) + K eps) * sum(n).

    Counts and sums are those of all processes. The states of a call are quantised by the codebook
    as it was before.

    Args:
        num_actions: ``K``.
        width: ``M``.
        decay: d.
        commitment: Weight of the squared distance between a state and its entry.
        eps: Keeps an entry without states finite.
    """

    A: Tensor
    count: Tensor
    total: Tensor

    def __init__(
        self,
        num_actions: int,
        width: int,
        *,
        decay: float = 0.9,
        commitment: float = 0.25,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.decay, self.commitment, self.eps = decay, commitment, eps
        vectors = torch.randn(num_actions, width) * width**-0.5
        self.register_buffer("A", vectors)
        self.register_buffer("count", torch.ones(num_actions))
        self.register_buffer("total", vectors.clone())

    def scores(self, z: Tensor) -> Tensor:
        """``-|z - A_k|^2`` up to what is the same for all k, ``(..., K)`` of ``z (..., M)``."""
        with torch.autocast(z.device.type, enabled=False):  # or the nearest may be another one
            return 2 * z.float() @ self.A.mT - self.A.square().sum(dim=-1)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise states.

        Args:
            z: ``(..., M)``.
            mask: Boolean ``(...)``, True = the codebook follows this state; None for all.

        Returns:
            The nearest entries ``(..., M)``, whose gradient goes to ``z`` as it is; their indices
            ``(...)``; and the weighted commitment ``mean_M (z - A_k)^2`` of each state ``(...)``.
        """
        index = self.scores(z).argmax(dim=-1)
        nearest = self.A[index].to(z.dtype)
        commitment = self.commitment * (z - nearest).float().square().mean(dim=-1)
        if self.training:
            followed = torch.ones_like(commitment) if mask is None else mask.to(commitment.dtype)
            self.follow(z.detach().float().flatten(0, -2), index.flatten(), followed.flatten())
        return z + (nearest - z).detach(), index, commitment

    @torch.no_grad()
    def follow(self, states: Tensor, index: Tensor, weights: Tensor) -> None:
        """Move towards ``states (N, M)`` that take the entries ``index (N,)``, as ``weights`` say.

        Args:
            states: ``(N, M)``.
            index: ``(N,)``.
            weights: ``(N,)``, 0 for a state that does not count.
        """
        count = torch.zeros_like(self.count).index_add_(0, index, weights)
        total = torch.zeros_like(self.total).index_add_(0, index, states * weights[:, None])
        add_up(count)
        add_up(total)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        everything = self.count.sum()
        share = (self.count + self.eps) / (everything + len(self.count) * self.eps)
        # A new tensor: the one before may be kept for the backward pass.
        self.A = self.total / (share * everything)[:, None]
