"""Losses of the demonstrator and of the learner.

Reductions are fixed here, because the paper leaves them open: sum over the K actions, mean over
layers and valid positions.

Shapes: L layers with actions, B batch, T target length, K actions, V vocabulary.
"""

import torch
from separata_shared.data.vocabulary import PAD
from torch import Tensor, nn
from torch.nn import functional as F

from .processes import add_up


class BalanceRegulariser(nn.Module):
    """Keeps the demonstrator's actions in use, each about as much as the others.

    A moving average of the mean activation, ``c <- alpha c + (1 - alpha) mean(pi)``, starting at
    1/K, gives the sharpened and rebalanced target ``pi'_k ~ pi_k^2 / c_k``; the loss is
    ``KL(pi' || pi)``. This is the self-training target of deep embedded clustering (Xie et al.
    2016, Eq. 3) with a running frequency. pi' and c are constant for the gradient.

    c is a buffer: it is saved in checkpoints, equal in all processes, and moves in training only.

    Args:
        num_layers: Layers with actions, L.
        num_actions: K.
        decay: alpha.
    """

    c: Tensor

    def __init__(self, num_layers: int, num_actions: int, *, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("c", torch.full((num_layers, num_actions), 1.0 / num_actions))

    def forward(self, log_pi: Tensor, mask: Tensor) -> Tensor:
        """Update c, in training, then compare.

        Args:
            log_pi: Log-probabilities ``(L, B, T, K)``.
            mask: Boolean ``(B, T)``, True = valid target.

        Returns:
            The loss, a scalar; at least 0.
        """
        if self.training:
            self.update(log_pi, mask)
        target = sharpened(log_pi.detach(), self.c[:, None, None]).exp()
        divergence = F.kl_div(log_pi, target, reduction="none").sum(dim=-1)
        return masked_mean(divergence, mask)

    @torch.no_grad()
    def update(self, log_pi: Tensor, mask: Tensor) -> None:
        """Move c towards the mean of pi over the valid targets of all processes."""
        pi = log_pi.exp() * mask[:, :, None]
        sums = F.pad(pi.sum(dim=(1, 2)), (0, 1), value=float(0))  # (L, K + 1)
        sums[:, -1] = mask.sum()
        add_up(sums)
        mean = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        self.c.lerp_(mean.to(self.c.dtype), 1 - self.decay)


def sharpened(log_pi: Tensor, frequency: Tensor) -> Tensor:
    """Log of the target ``pi'_k ~ pi_k^2 / f_k``, normalised over k.

    Args:
        log_pi: Log-probabilities ``(..., K)``.
        frequency: How much each action is used, broadcastable to ``(..., K)``, positive.

    Returns:
        Log-probabilities ``(..., K)``.
    """
    # An action that is never used has no share of pi either; the floor keeps 0 / 0 away.
    floor = torch.finfo(frequency.dtype).tiny
    return (2 * log_pi - frequency.clamp(min=floor).log()).log_softmax(dim=-1)


def student_t(z: Tensor, centres: Tensor) -> Tensor:
    """Soft assignment of deep embedded clustering, ``q_k ~ 1 / (1 + |z - c_k|^2)``.

    Xie et al. 2016, Eq. 1, with one degree of freedom.

    Args:
        z: Points ``(N, M)``.
        centres: ``(K, M)``.

    Returns:
        Log-probabilities ``(N, K)``.
    """
    distance = (z[:, None] - centres).square().sum(dim=-1)
    return distance.log1p().neg().log_softmax(dim=-1)


def imitation_loss(log_pi_demonstrator: Tensor, log_pi_learner: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy ``L_IL = -sum_k pi_AT,k log pi_NAT,k``; never of words.

    Args:
        log_pi_demonstrator: Log-probabilities ``(L, B, T, K)`` of the frozen, teacher-forced
            demonstrator; no gradient goes there.
        log_pi_learner: Log-probabilities ``(L, B, T, K)``.
        mask: Boolean ``(B, T)``, True = valid target.

    Returns:
        The mean over layers and valid positions, a scalar; at least the entropy of the
        demonstrator's actions.

    Raises:
        ValueError: The two have different layers, positions or actions.
    """
    if log_pi_demonstrator.shape != log_pi_learner.shape:
        raise ValueError(
            f"the learner's actions are {tuple(log_pi_learner.shape)} (layers, sentences, "
            f"positions, actions), the demonstrator's {tuple(log_pi_demonstrator.shape)}"
        )
    target = log_pi_demonstrator.detach().exp()
    return masked_mean(-(target * log_pi_learner).sum(dim=-1), mask)


def word_loss(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """``(1 - s) NLL + s / V sum_v -log p_v``, and NLL alone; means over the valid targets.

    Args:
        logits: ``(B, T, V)``.
        target: Tokens ``(B, T)``; PAD where nothing is to be learned.
        label_smoothing: s.

    Returns:
        Two scalars; 0 where there is no valid target.
    """
    real = target.ne(PAD)
    log_probs = logits.float().log_softmax(dim=-1)
    nll = masked_mean(-log_probs.gather(-1, target[..., None]).squeeze(-1), real)
    smooth = masked_mean(-log_probs.mean(dim=-1), real)
    return (1 - label_smoothing) * nll + label_smoothing * smooth, nll


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values (..., B, T)`` over the leading dimensions and the places of the mask.

    0 where there is nothing to average.
    """
    kept = values.where(mask, 0.0)
    return kept.sum() / (mask.sum() * (values.numel() // mask.numel())).clamp(min=1)
