"""Encoder and decoder: stacks of layers and an optional final norm."""

from collections.abc import Iterable

from torch import Tensor, nn

from separata_shared.nn.cache import DecoderState


class Encoder(nn.Module):
    """A stack of encoder layers.

    Args:
        layers: Called in order as ``layer(x, mask=mask)``.
        final_norm: Applied to the last output; None for none.
    """

    def __init__(self, layers: Iterable[nn.Module], *, final_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.Identity() if final_norm is None else final_norm

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map ``x (B, S, M)`` to ``(B, S, M)``.

        Args:
            x: ``(B, S, M)``.
            mask: Boolean, broadcastable to ``(B, H, S, S)``, True = may attend; for padding see
                ``padding_mask``.

        Returns:
            ``(B, S, M)``.
        """
        for layer in self.layers:
            x = layer(x, mask=mask)
        output: Tensor = self.final_norm(x)
        return output


class Decoder(nn.Module):
    """A stack of decoder layers.

    ``forward`` reads whole target sequences; ``start`` and ``step`` decode piece by piece, with the
    same result.

    Args:
        layers: Called in order like ``DecoderLayer``.
        final_norm: Applied to the last output; None for none.
    """

    def __init__(self, layers: Iterable[nn.Module], *, final_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.Identity() if final_norm is None else final_norm

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        state: DecoderState | None = None,
    ) -> Tensor:
        """Run all layers; self-attention is causal.

        Args:
            x: ``(B, T, M)``.
            memory: ``(B, S, M)``.
            memory_mask: Boolean, broadcastable to ``(B, H, T, S)``, True = may attend.
            self_mask: Boolean, broadcastable to ``(B, H, T, T)``, besides causality.
            state: What earlier calls left; ``x`` then holds the positions after those.

        Returns:
            ``(B, T, M)``.
        """
        for number, layer in enumerate(self.layers):
            cache = None if state is None else state.layers[number]
            x = layer(x, memory, memory_mask=memory_mask, self_mask=self_mask, cache=cache)
        output: Tensor = self.final_norm(x)
        return output

    def start(self, memory: Tensor, *, memory_mask: Tensor | None = None) -> DecoderState:
        """Make the state for decoding from ``memory (B, S, M)``."""
        return DecoderState(memory, memory_mask, len(self.layers))

    def step(self, x: Tensor, state: DecoderState) -> Tensor:
        """Run the next positions.

        Args:
            x: ``(N, T, M)`` with ``N = B * G`` rows, the ``G`` hypotheses of a sentence together.
            state: Made by ``start``; updated in place.

        Returns:
            ``(N, T, M)``.
        """
        output: Tensor = self(x, state.memory, memory_mask=state.memory_mask, state=state)
        return output
