"""The language model of the enwik8 experiment: a Transformer-XL with any norm in all places.

Dai et al. 2019, "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", arXiv
1901.02860. A block of queries attends to itself and to what each layer read of the positions before
it; where a key stands is said relative to the query.

Shapes: B batch, T positions of a block, L positions of the memory, S = L + T keys, H heads, D width
per head, M model width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from separata_shared.attention import dense_attention
from separata_shared.nn import FeedForward, PostNorm, PreNorm
from separata_shared.nn.residual import Norm
from torch import Tensor, nn
from torch.nn import functional as F


def shift(scores: Tensor) -> Tensor:
    """From scores by distance to scores by key.

    Args:
        scores: ``(B, H, T, S)``; column c belongs to the distance ``S - 1 - c``.

    Returns:
        ``(B, H, T, S)``; column j of row i belongs to the distance of key j from query i, which is
        ``i + S - T - j``. Keys behind the query get arbitrary values.
    """
    rows, keys = scores.shape[-2:]
    # With one zero before each row, reading in rows of T moves row i to the left by T - 1 - i.
    padded = F.pad(scores, (1, 0)).reshape(*scores.shape[:-2], keys + 1, rows)
    return padded[..., 1:, :].reshape(scores.shape)


def distance_vectors(keys: int, width: int, *, like: Tensor) -> Tensor:
    """Sinusoids of the distances S - 1 to 0: ``(S, M)``."""
    distances = torch.arange(keys - 1, -1, -1.0, device=like.device)
    exponents = torch.arange(0, width, 2, device=like.device) / width
    angles = distances[:, None] / 10_000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(like.dtype)


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions (Dai et al. 2019, section 3.3).

    The score of query i and key j is ``((q_i + u) k_j + (q_i + v) W r_(i-j)) / sqrt(D)``. The
    biases u and v belong to this layer; the published code shares them among all.

    Args:
        width: Model width M.
        num_heads: Heads H; divides ``width``.
        dropout: Dropout on the weights.
    """

    def __init__(self, width: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.distance_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, 1, width // num_heads))
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, 1, width // num_heads))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.distance_proj):
            nn.init.xavier_uniform_(projection.weight)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Attend from the block ``x (B, T, M)`` to ``past (B, S, M)``, which ends with it."""
        query, key, value = self.q_proj(x), self.k_proj(past), self.v_proj(past)
        query, key, value = (self._heads(states) for states in (query, key, value))
        distances = distance_vectors(past.shape[1], past.shape[2], like=past)
        distances = self._heads(self.distance_proj(distances)[None])  # (1, H, S, D)
        bias = shift((query + self.distance_bias) @ distances.mT) / math.sqrt(query.shape[-1])
        output = dense_attention(
            query + self.content_bias,
            key,
            value,
            bias=bias,
            causal=True,
            dropout=self.dropout if self.training else 0.0,
        )
        assert isinstance(output, Tensor)
        projected: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, states: Tensor) -> Tensor:
        """``(B, T, M)`` as ``(B, H, T, D)``."""
        return states.reshape(*states.shape[:2], self.num_heads, -1).transpose(1, 2)


class RecurrentLayer(nn.Module):
    """Relative attention and feed-forward, each in a residual wiring.

    Args:
        attention: Called as ``attention(x, past)``.
        feed_forward: Called as ``feed_forward(x)``.
        residual: Makes the residual wiring of one sub-layer; called twice.
        memory: Positions L that are kept for the next block.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        residual: Callable[[], nn.Module],
        memory: int,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_residual = residual()
        self.feed_forward = feed_forward
        self.feed_forward_residual = residual()
        self.memory = memory

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Map the block ``x (B, T, M)``; read and renew the cache ``(B, L, M)``.

        The cache holds what the attention reads, after the norm of a pre-norm wiring.
        """
        past = cache

        def attend(read: Tensor) -> Tensor:
            nonlocal past
            past = torch.cat([cache.to(read.dtype), read], dim=1)
            attended: Tensor = self.attention(read, past)
            return attended

        x = self.attention_residual(x, attend)
        x = self.feed_forward_residual(x, self.feed_forward)
        return x, past[:, -self.memory :].detach()


class RecurrentTransformer(nn.Module):
    """Language model that reads a text block by block and remembers.

    Args:
        vocabulary_size: Symbols V.
        width: Model width M.
        layers: The stack.
        final_norm: Applied to the last layer's output.
        dropout: Dropout on the embeddings and the last states.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int,
        layers: Sequence[RecurrentLayer],
        final_norm: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self.dropout = nn.Dropout(dropout)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def start(self, batch_size: int) -> list[Tensor]:
        """Empty caches ``(B, 0, M)``, one per layer: nothing has been read."""
        weight = self.embedding.weight
        return [weight.new_zeros(batch_size, 0, self.width) for _ in self.layers]

    def forward(self, tokens: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Score the symbol after each of ``tokens``.

        Args:
            tokens: The next block of the text ``(B, T)``.
            caches: What the call for the block before returned, or ``start(B)``.

        Returns:
            Logits ``(B, T, V)`` and the caches for the next block, which carry no gradient.
        """
        x = self.dropout(self.embedding(tokens) * math.sqrt(self.width))
        kept = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, renewed = layer(x, cache)
            kept.append(renewed)
        states = self.dropout(self.final_norm(x))
        return F.linear(states, self.embedding.weight, self.output_bias), kept


def build_recurrent_transformer(
    vocabulary_size: int,
    *,
    width: int,
    hidden_width: int,
    num_heads: int,
    num_layers: int,
    dropout: float,
    memory: int,
    normalisation: Literal["post", "pre"],
    norm: Norm,
) -> RecurrentTransformer:
    """Compose the language model.

    Args:
        vocabulary_size: Symbols V.
        width: Model width M.
        hidden_width: Inner width of the feed-forward layers.
        num_heads: Heads H.
        num_layers: Layers.
        dropout: Dropout everywhere but on attention weights.
        memory: Positions L that each layer remembers.
        normalisation: The norm after the residual sum, or before the sub-layer.
        norm: Makes every norm for a width.

    Returns:
        The model, in training mode.
    """
    wiring = {"post": PostNorm, "pre": PreNorm}[normalisation]
    residual = partial(wiring, width, norm=norm, dropout=dropout)
    layers = [
        RecurrentLayer(
            RelativeAttention(width, num_heads),
            FeedForward(width, hidden_width, dropout=dropout),
            residual=residual,
            memory=memory,
        )
        for _ in range(num_layers)
    ]
    final_norm = norm(width) if normalisation == "pre" else nn.Identity()
    return RecurrentTransformer(
        vocabulary_size, width=width, layers=layers, final_norm=final_norm, dropout=dropout
    )
