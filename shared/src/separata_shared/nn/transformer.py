"""The encoder-decoder as a whole.

Shapes: ``B`` batch, ``T`` target length, ``S`` source length, ``M`` model width, ``V`` vocabulary,
``N`` rows being decoded.
"""

from collections.abc import Callable

from torch import Tensor, nn

from separata_shared.nn.attention import padding_mask
from separata_shared.nn.cache import DecoderState
from separata_shared.nn.stack import Decoder, Encoder


class InputEmbedding(nn.Module):
    """Scaled token vectors plus positions, with dropout.

    Args:
        tokens: Table of token vectors, possibly shared with another part of the model.
        positions: Module that gives a vector for the position of each token.
        dropout: Share of the sums set to zero in training.
    """

    def __init__(self, tokens: nn.Module, positions: nn.Module, *, dropout: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, *, offset: int = 0) -> Tensor:
        """Embed ``tokens (B, T)``, the first at position ``offset``, as ``(B, T, M)``."""
        embedded: Tensor = self.dropout(self.tokens(tokens) + self.positions(tokens, offset=offset))
        return embedded


class Transformer(nn.Module):
    """Encoder-decoder (Vaswani et al. 2017) made of parts, each of which can be another module.

    Args:
        source: Embedding of the source tokens.
        encoder: Stack of encoder layers.
        target: Embedding of the target tokens.
        decoder: Stack of decoder layers.
        output: Projection of the decoder states to the vocabulary.
        padding_index: Token that fills short sequences and is never attended.
    """

    def __init__(
        self,
        *,
        source: nn.Module,
        encoder: Encoder,
        target: nn.Module,
        decoder: Decoder,
        output: Callable[[Tensor], Tensor],
        padding_index: int,
    ) -> None:
        super().__init__()
        self.source = source
        self.encoder = encoder
        self.target = target
        self.decoder = decoder
        self.output = output
        self.padding_index = padding_index

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encode source tokens.

        Args:
            source: Tokens ``(B, S)``, padded on either side.

        Returns:
            States ``(B, S, M)`` and the mask ``(B, 1, 1, S)`` of the positions that may be
            attended.
        """
        mask = padding_mask(source, self.padding_index)
        return self.encoder(self.source(source), mask=mask), mask

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score every next token given the true tokens before it.

        Args:
            source: Source tokens ``(B, S)``.
            target: Decoder input ``(B, T)``: the target sentence moved one place to the right.

        Returns:
            Logits ``(B, T, V)``.
        """
        memory, mask = self.encode(source)
        states = self.decoder(self.target(target), memory, memory_mask=mask)
        return self.output(states)

    def start(self, source: Tensor) -> DecoderState:
        """Encode ``source (B, S)`` and make the state of a decoder that has read nothing yet."""
        memory, mask = self.encode(source)
        # A mask that hides nothing would cost several operations in every layer of every step.
        return self.decoder.start(memory, memory_mask=None if mask.all() else mask)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Score the tokens after ``tokens (N,)``: logits ``(N, V)``; N is a multiple of B.

        ``state`` is updated in place.
        """
        embedded = self.target(tokens[:, None], offset=state.length)
        return self.output(self.decoder.step(embedded, state)[:, -1])
