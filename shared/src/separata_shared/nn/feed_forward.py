"""The position-wise feed-forward network."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """``fc2(dropout(activation(fc1(x))))`` (Vaswani et al. 2017, Eq. 2).

    Args:
        width: Model width ``M`` of input and output.
        hidden_width: Width between the two layers.
        activation: Function or module between them.
        dropout: Dropout after the activation in training.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases."""
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, M)`` to ``(B, T, M)``."""
        output: Tensor = self.fc2(self.dropout(self.activation(self.fc1(x))))
        return output
