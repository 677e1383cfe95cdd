"""Token and position embeddings.

Positions count the tokens that are not padding, from ``padding_index + 1`` upwards as in fairseq,
so a sentence gets the same positions whether it is padded on the left or on the right.

Shapes: ``B`` batch, ``T`` length, ``M`` model width, ``V`` vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenEmbedding(nn.Embedding):
    """Token vectors scaled by ``sqrt(M)``, which can also serve as the output layer.

    Weights are drawn from N(0, 1/M); the row of the padding token is zero.

    Args:
        num_tokens: Vocabulary size ``V``.
        width: Model width ``M``.
        padding_index: The padding token.
    """

    padding_idx: int

    def __init__(self, num_tokens: int, *, width: int, padding_index: int) -> None:
        super().__init__(num_tokens, width, padding_idx=padding_index)
        self.scale = math.sqrt(width)

    def reset_parameters(self) -> None:
        """Draw the weights; called by the constructor of ``nn.Embedding``."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, T)`` to vectors ``(B, T, M)``."""
        return super().forward(tokens) * self.scale

    def project(self, x: Tensor) -> Tensor:
        """Score every token with the same weights: ``(..., M)`` to logits ``(..., V)``."""
        return F.linear(x, self.weight)


class LearnedPositions(nn.Embedding):
    """A learned vector for each position.

    Args:
        width: Model width ``M``.
        padding_index: The padding token; positions start behind it and its own row is zero.
        max_length: Longest sentence.
    """

    padding_idx: int

    def __init__(self, width: int, *, padding_index: int, max_length: int) -> None:
        super().__init__(max_length + padding_index + 1, width, padding_idx=padding_index)
        self.max_length = max_length

    def reset_parameters(self) -> None:
        """Draw the weights; called by the constructor of ``nn.Embedding``."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, tokens: Tensor, *, offset: int = 0) -> Tensor:
        """Look up the positions of ``tokens``.

        Args:
            tokens: ``(B, T)``.
            offset: Number of tokens of each sentence that came in earlier calls.

        Returns:
            ``(B, T, M)``.

        Raises:
            ValueError: ``offset + T`` exceeds ``max_length``.
        """
        length = offset + tokens.size(1)
        if length > self.max_length:
            raise ValueError(
                f"a sentence of {length} tokens is longer than the {self.max_length} learned "
                "positions: raise max_length or shorten the sentence"
            )
        return super().forward(position_numbers(tokens, self.padding_idx, offset))


class SinusoidalPositions(nn.Module):
    """Fixed position vectors ``[sin(p w_0) ... | cos(p w_0) ...]`` in fairseq's layout.

    The frequencies are ``w_i = 10000^(-i / (M/2 - 1))``; the last column is zero when ``M`` is odd.
    The formula of Vaswani et al. 2017, section 3.5, interleaves sine and cosine and has ``M/2`` in
    the exponent instead.

    Args:
        width: Model width ``M``.
        padding_index: The padding token; positions start behind it and its own row is zero.
        max_length: Length of the table; longer sentences are computed when they come.
    """

    table: Tensor

    def __init__(self, width: int, *, padding_index: int, max_length: int) -> None:
        super().__init__()
        self.width = width
        self.padding_index = padding_index
        table = sinusoid_table(max_length + padding_index + 1, width, padding_index)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens: Tensor, *, offset: int = 0) -> Tensor:
        """Look up the positions of ``tokens``.

        Args:
            tokens: ``(B, T)``.
            offset: Number of tokens of each sentence that came in earlier calls.

        Returns:
            ``(B, T, M)``.
        """
        table = self.table
        needed = self.padding_index + 1 + offset + tokens.size(1)
        if needed > table.size(0):
            table = sinusoid_table(needed, self.width, self.padding_index).to(table)
        return F.embedding(position_numbers(tokens, self.padding_index, offset), table)


def position_numbers(tokens: Tensor, padding_index: int, offset: int = 0) -> Tensor:
    """Number the tokens of each row, skipping padding.

    Args:
        tokens: ``(B, T)``.
        padding_index: The padding token, which gets its own index as position.
        offset: Number of tokens of each row that came earlier.

    Returns:
        ``(B, T)``: the first token has ``padding_index + 1 + offset``.
    """
    real = tokens != padding_index
    return torch.where(real, real.cumsum(dim=1) + (padding_index + offset), padding_index)


def sinusoid_table(num_positions: int, width: int, padding_index: int) -> Tensor:
    """The vectors ``(num_positions, M)`` of ``SinusoidalPositions``, float32."""
    half = width // 2
    step = math.log(10000) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    table = torch.zeros(num_positions, width)
    table[:, :half] = angles.sin()
    table[:, half : 2 * half] = angles.cos()
    table[padding_index] = 0.0
    return table
