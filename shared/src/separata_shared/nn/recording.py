"""Look at the attention weights of a model, for plots and reports."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from separata_shared.attention import Attend
from separata_shared.nn.attention import MultiHeadAttention


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the attention weights of every ``MultiHeadAttention`` called inside the block.

    Args:
        model: Module with attention modules anywhere below it.

    Yields:
        Module name to the weights ``(B, H, T, S)`` of its latest call, detached, before dropout.
    """
    weights: dict[str, Tensor] = {}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)]
    attends = [module.attend for _, module in found]
    for name, module in found:
        module.replace_attend(_Recorder(module.attend, name, weights))
    try:
        yield weights
    finally:
        for (_, module), attend in zip(found, attends, strict=True):
            module.replace_attend(attend)


class _Recorder(nn.Module):
    """Calls an attention function and keeps its weights under a name."""

    def __init__(self, attend: Attend, name: str, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.name = name
        self.weights = weights

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> Tensor:
        output, weights = self.attend(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout=dropout,
            return_weights=True,
        )
        self.weights[self.name] = weights.detach()
        return output
