"""Attention as functions on tensors, without parameters."""

from typing import Protocol

from torch import Tensor

from separata_shared.attention.dense import dense_attention
from separata_shared.attention.topk import topk_attention

__all__ = ["Attend", "dense_attention", "topk_attention"]


class Attend(Protocol):
    """An attention function as modules use it.

    ``dense_attention`` is one, and so is ``functools.partial(topk_attention, top_k=8)``.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; shapes and meaning as in ``dense_attention``."""
        ...
