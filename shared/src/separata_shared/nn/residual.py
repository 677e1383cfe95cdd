"""Residual wirings: where the norm, the dropout and the sum stand around a sub-layer.

Each is called as ``residual(x, sublayer)``. The norm is made by a factory, so that a layer which is
handed another factory has no ``nn.LayerNorm`` left.
"""

from collections.abc import Callable

from torch import Tensor, nn

Sublayer = Callable[[Tensor], Tensor]
Norm = Callable[[int], nn.Module]


class PostNorm(nn.Module):
    """``norm(x + dropout(f(x)))`` (Vaswani et al. 2017, section 3.1).

    Args:
        width: Model width ``M``.
        norm: Makes the norm for a width.
        dropout: Dropout on the sub-layer's output in training.
    """

    def __init__(self, width: int, *, norm: Norm = nn.LayerNorm, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """Apply ``sublayer`` to ``x (B, T, M)``."""
        output: Tensor = self.norm(x + self.dropout(sublayer(x)))
        return output


class PreNorm(nn.Module):
    """``x + dropout(f(norm(x)))``; a stack of these needs a final norm.

    Args:
        width: Model width ``M``.
        norm: Makes the norm for a width.
        dropout: Dropout on the sub-layer's output in training.
    """

    def __init__(self, width: int, *, norm: Norm = nn.LayerNorm, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """Apply ``sublayer`` to ``x (B, T, M)``."""
        output: Tensor = x + self.dropout(sublayer(self.norm(x)))
        return output


class SandwichNorm(nn.Module):
    """``x + dropout(norm2(f(norm1(x))))`` (Ding et al. 2021, section 2.4).

    Args:
        width: Model width ``M``.
        norm: Makes the norm for a width; called twice.
        dropout: Dropout on the sub-layer's output in training.
    """

    def __init__(self, width: int, *, norm: Norm = nn.LayerNorm, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.norm2 = norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """Apply ``sublayer`` to ``x (B, T, M)``."""
        output: Tensor = x + self.dropout(self.norm2(sublayer(self.norm1(x))))
        return output
