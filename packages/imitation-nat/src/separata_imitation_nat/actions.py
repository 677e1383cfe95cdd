"""Action modules: what a decoder layer does, as a distribution over K discrete actions.

After the two attentions of a layer, and before its feed-forward network, the state r of a position
gives a distribution over the layer's actions and their mixture, which enters the state:

    pi = softmax(FFN_a(r))          (B, T, K)
    u  = pi A                       (B, T, M), with the codebook A (K, M)
    r' = norm(r + u)

Shapes: ``B`` batch, ``T`` target length, ``K`` actions, ``M`` width, ``L`` layers with actions.
"""

from collections.abc import Callable

import torch
from separata_shared.nn import Decoder, DecoderLayer
from separata_shared.nn.cache import DecoderState, LayerCache
from torch import Tensor, nn
from torch.nn import functional as F

from .codebook import EMACodebook

Combine = Callable[[Tensor, Tensor], Tensor]
"""From state ``r`` and action vector ``u``, each ``(B, T, M)``, to what is added to ``r``."""


class ActionTrace:
    """What the action modules emit in one pass of a decoder, collected layer by layer.

    An argument instead of a result: with one, a layer still maps states to states, and nothing is
    computed or kept for those who do not ask.

    Args:
        mask: Boolean ``(B, T)``, True = real position; codebooks follow these only. None for all.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask
        self._log_pi: list[Tensor] = []
        self._commitment: list[Tensor] = []

    def add(self, log_pi: Tensor, commitment: Tensor | None = None) -> None:
        """Add a layer's log-probabilities ``(B, T, K)`` and, where it has one, commitment."""
        self._log_pi.append(log_pi)
        if commitment is not None:
            self._commitment.append(commitment)

    @property
    def log_pi(self) -> Tensor:
        """Log-probabilities ``(L, B, T, K)``; without action modules an empty tensor."""
        return torch.stack(self._log_pi) if self._log_pi else torch.empty(0, 0, 0, 0)

    @property
    def commitment(self) -> Tensor | None:
        """Mean over layers of what ``(B, T)`` each position pays; None without hard actions."""
        return torch.stack(self._commitment).mean(dim=0) if self._commitment else None


class FFN(nn.Module):
    """``W_2 relu(W_1 r)`` with biases, the network FFN_a from states to scores.

    Args:
        width: Model width ``M``, also of the hidden layer.
        out_width: Width of the result.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, out_width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, r: Tensor) -> Tensor:
        """Map ``(..., M)`` to ``(..., out_width)``."""
        scores: Tensor = self.fc2(F.relu(self.fc1(r)))
        return scores


class Codebook(nn.Module):
    """The vectors A ``(K, M)`` of the actions of one layer, or of all layers that share it.

    Args:
        num_actions: ``K``.
        width: Model width ``M``.
    """

    def __init__(self, num_actions: int, width: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(num_actions, width) * width**-0.5)


class SoftActions(nn.Module):
    """Every state mixes all actions (section 1.2 of the paper's method).

    Args:
        width: Model width ``M``.
        codebook: The actions' vectors.
    """

    def __init__(self, width: int, codebook: Codebook) -> None:
        super().__init__()
        self.scores = FFN(width, len(codebook.A))
        self.codebook = codebook

    def forward(self, r: Tensor, trace: ActionTrace | None = None) -> Tensor:
        """Map states ``r (B, T, M)`` to action vectors ``u (B, T, M)``."""
        scores = self.scores(r)
        if trace is not None:
            trace.add(scores.float().log_softmax(dim=-1))
        u: Tensor = scores.softmax(dim=-1) @ self.codebook.A
        return u


class HardActions(nn.Module):
    """Every state takes the action that is nearest to ``z = FFN_a(r)``; the codebook follows.

    ``pi = softmax_k(-|z - A_k|^2)``, u is the most likely A_k, and its gradient goes to z as it is
    (straight-through).

    Args:
        width: Model width ``M``.
        codebook: The actions' vectors.
    """

    def __init__(self, width: int, codebook: EMACodebook) -> None:
        super().__init__()
        self.query = FFN(width, width)
        self.codebook = codebook

    def forward(self, r: Tensor, trace: ActionTrace | None = None) -> Tensor:
        """Map states ``r (B, T, M)`` to action vectors ``u (B, T, M)``."""
        z = self.query(r)
        u: Tensor
        if trace is None:
            u, _, _ = self.codebook(z)
            return u
        # The quantiser moves the codebook in training, so the distribution is taken first.
        log_pi = self.codebook.scores(z).log_softmax(dim=-1)
        u, _, commitment = self.codebook(z, trace.mask)
        trace.add(log_pi, commitment)
        return u


def add(r: Tensor, u: Tensor) -> Tensor:
    """``r' = r + u``, as in the paper."""
    return u


class Gate(nn.Module):
    """``r' = r + g * u`` with ``g = sigmoid(W [r; u])``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)

    def forward(self, r: Tensor, u: Tensor) -> Tensor:
        """What is added to ``r (B, T, M)``."""
        gate: Tensor = self.gate(torch.cat((r, u), dim=-1)).sigmoid()
        return gate * u


class Concat(nn.Module):
    """``r' = r + W [r; u]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * width, width)

    def forward(self, r: Tensor, u: Tensor) -> Tensor:
        """What is added to ``r (B, T, M)``."""
        added: Tensor = self.projection(torch.cat((r, u), dim=-1))
        return added


class ActionLayer(DecoderLayer):
    """A decoder layer with an action module between its attentions and its feed-forward network.

    Args:
        parts: Self-attention, cross-attention and feed-forward network.
        residual: Makes the residual wiring of one sub-layer.
        action: Called as ``action(r, trace)``; gives u.
        combine: Puts u into the state.
        action_residual: Residual wiring around the action.
    """

    def __init__(
        self,
        *parts: nn.Module,
        residual: Callable[[], nn.Module],
        action: nn.Module,
        combine: Combine,
        action_residual: nn.Module,
    ) -> None:
        super().__init__(*parts, residual=residual)
        self.action = action
        self.combine = combine
        self.action_residual = action_residual

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        trace: ActionTrace | None = None,
    ) -> Tensor:
        """Run the layer; arguments of ``DecoderLayer``, and where to leave the distribution."""
        r = self.attend(x, memory, memory_mask=memory_mask, self_mask=self_mask, cache=cache)
        r = self.action_residual(r, lambda y: self.combine(y, self.action(y, trace)))
        output: Tensor = self.feed_forward_residual(r, self.feed_forward)
        return output


class ActionDecoder(Decoder):
    """A stack of decoder layers, some or all of them with actions."""

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        state: DecoderState | None = None,
        trace: ActionTrace | None = None,
    ) -> Tensor:
        """Run all layers; arguments of ``Decoder``, and where to leave the distributions."""
        for number, layer in enumerate(self.layers):
            cache = None if state is None else state.layers[number]
            x = layer(
                x,
                memory,
                memory_mask=memory_mask,
                self_mask=self_mask,
                cache=cache,
                **({"trace": trace} if isinstance(layer, ActionLayer) else {}),
            )
        output: Tensor = self.final_norm(x)
        return output
