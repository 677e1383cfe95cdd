"""A linear-chain CRF over the target with low-rank transitions (Sun et al. 2019), a peer.

    score(y) = sum_t emission_t(y_t) + sum_t E1(y_{t-1}) . E2(y_t)

The sum over all sequences and the best sequence are approximated by the k words of highest emission
at each position.

Shapes: B batch, T target length, V vocabulary, k words kept, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class BestPath(NamedTuple):
    """What ``LowRankCRF.viterbi`` found."""

    tokens: Tensor
    """``(B, T)``; anything at padding."""
    places: Tensor
    """Which of the k words each token is, ``(B, T)``."""
    prefixes: Tensor
    """Score of the best prefix that ends in each kept word, ``(B, T, k)``; the last is kept up at
    padding."""

    @property
    def scores(self) -> Tensor:
        """What each token adds to the score, ``(B, T)``; 0 at padding."""
        reached = self.prefixes.gather(2, self.places[:, :, None]).squeeze(2)
        return torch.cat((reached[:, :1], reached.diff(dim=1)), dim=1)


class LowRankCRF(nn.Module):
    """Transitions ``E1 E2^T`` between neighbouring words.

    Args:
        num_tokens: Vocabulary size V.
        rank: R.
        beam: Words kept at each position, k.
    """

    def __init__(self, num_tokens: int, *, rank: int = 32, beam: int = 64) -> None:
        super().__init__()
        self.E1 = nn.Parameter(torch.randn(num_tokens, rank) * rank**-0.5)
        self.E2 = nn.Parameter(torch.randn(num_tokens, rank) * rank**-0.5)
        self.beam = beam

    def forward(self, emissions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Log-likelihood of the targets.

        Args:
            emissions: ``(B, T, V)``.
            targets: ``(B, T)``; always among the words kept.
            mask: Boolean ``(B, T)``, True = valid; on the left.

        Returns:
            ``(B,)``.
        """
        scores = emissions.gather(2, targets[:, :, None]).squeeze(2)
        steps = (self.E1[targets[:, :-1]] * self.E2[targets[:, 1:]]).sum(dim=-1)
        path = (scores * mask).sum(dim=1) + (steps * mask[:, 1:]).sum(dim=1)
        return path - self.log_normaliser(emissions, targets, mask)

    def log_normaliser(self, emissions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Log of the summed scores of all sequences of kept words, ``(B,)``."""
        with_target = emissions.scatter(2, targets[:, :, None], torch.inf)
        kept = with_target.topk(self._kept(emissions), dim=2).indices
        scores = emissions.gather(2, kept)
        transitions = self._transitions(kept)
        total = scores[:, 0]  # (B, k)
        # A chain is summed in its order; the loop is over time, k^2 numbers at once.
        for t in range(1, emissions.size(1)):
            step = (total[:, :, None] + transitions[:, t - 1]).logsumexp(dim=1) + scores[:, t]
            total = torch.where(mask[:, t, None], step, total)
        return total.logsumexp(dim=1)

    @torch.no_grad()
    def viterbi(self, emissions: Tensor, mask: Tensor) -> BestPath:
        """The best sequence of kept words.

        Args:
            emissions: ``(B, T, V)``.
            mask: Boolean ``(B, T)``, True = valid; on the left.

        Returns:
            The sequence and the scores on the way.
        """
        scores, kept = emissions.topk(self._kept(emissions), dim=2)
        transitions = self._transitions(kept)
        best = scores[:, 0]
        stay = torch.arange(best.size(1), device=best.device).expand_as(best)
        prefixes, parents = [best], []
        for t in range(1, emissions.size(1)):
            step, parent = (best[:, :, None] + transitions[:, t - 1]).max(dim=1)
            real = mask[:, t, None]
            best = torch.where(real, step + scores[:, t], best)
            prefixes.append(best)
            parents.append(torch.where(real, parent, stay))
        path = [best.argmax(dim=1, keepdim=True)]
        for parent in reversed(parents):
            path.append(parent.gather(1, path[-1]))
        places = torch.cat(path[::-1], dim=1)
        tokens = kept.gather(2, places[:, :, None]).squeeze(2)
        return BestPath(tokens, places, torch.stack(prefixes, dim=1))

    def _kept(self, emissions: Tensor) -> int:
        return min(self.beam, emissions.size(2))

    def _transitions(self, kept: Tensor) -> Tensor:
        """Scores ``(B, T - 1, k, k)`` of neighbours among ``kept (B, T, k)``."""
        return self.E1[kept[:, :-1]] @ self.E2[kept[:, 1:]].mT
