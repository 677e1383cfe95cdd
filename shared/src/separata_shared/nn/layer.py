"""Encoder and decoder layers: attention and feed-forward, each in a residual wiring.

The attention arguments may be any module called like ``MultiHeadAttention``, the residual one any
module called as ``residual(x, sublayer)``.
"""

from collections.abc import Callable

from torch import Tensor, nn

from separata_shared.nn.cache import LayerCache


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward.

    Args:
        self_attention: Called as ``self_attention(x, mask=mask)``.
        feed_forward: Called as ``feed_forward(x)``.
        residual: Makes the residual wiring of one sub-layer; called twice.
    """

    def __init__(
        self,
        self_attention: nn.Module,
        feed_forward: nn.Module,
        *,
        residual: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_attention_residual = residual()
        self.feed_forward = feed_forward
        self.feed_forward_residual = residual()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map ``x (B, S, M)`` to ``(B, S, M)``; ``mask`` broadcastable to ``(B, H, S, S)``."""
        x = self.self_attention_residual(x, lambda y: self.self_attention(y, mask=mask))
        x = self.feed_forward_residual(x, self.feed_forward)
        return x


class DecoderLayer(nn.Module):
    """Causal self-attention, then cross-attention, then feed-forward.

    Args:
        self_attention: Called as ``self_attention(x, mask=, causal=True, cache=)``.
        cross_attention: Called as ``cross_attention(x, memory, mask=, cache=)``.
        feed_forward: Called as ``feed_forward(x)``.
        residual: Makes the residual wiring of one sub-layer; called three times.
    """

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        feed_forward: nn.Module,
        *,
        residual: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_attention_residual = residual()
        self.cross_attention = cross_attention
        self.cross_attention_residual = residual()
        self.feed_forward = feed_forward
        self.feed_forward_residual = residual()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: ``(B, T, M)``.
            memory: ``(B, S, M)``.
            memory_mask: Boolean, broadcastable to ``(B, H, T, S)``, True = may attend.
            self_mask: Boolean, broadcastable to ``(B, H, T, T)``, besides causality.
            cache: Keys and values of earlier calls; the new ones are added to it.

        Returns:
            ``(B, T, M)``.
        """
        x = self.attend(x, memory, memory_mask=memory_mask, self_mask=self_mask, cache=cache)
        x = self.feed_forward_residual(x, self.feed_forward)
        return x

    def attend(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Run the two attentions alone, for layers that put something before the feed-forward.

        Arguments and result are those of ``forward``.
        """
        self_cache = None if cache is None else cache.self_attention
        cross_cache = None if cache is None else cache.cross_attention
        x = self.self_attention_residual(
            x,
            lambda y: self.self_attention(y, mask=self_mask, causal=True, cache=self_cache),
        )
        x = self.cross_attention_residual(
            x,
            lambda y: self.cross_attention(y, memory, mask=memory_mask, cache=cross_cache),
        )
        return x
