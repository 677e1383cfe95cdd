"""Character language model with adaptive attention span and top-k selection.

The sequential attention is that of Sukhbaatar et al. 2019, "Adaptive Attention Span in
Transformers" (arXiv 1905.07799): a block of queries looks back at the L positions before each of
them, the query's own position excluded, and every head learns how far. The selection stands
between its soft span mask and the renormalisation, as in the adaptive-span part of the authors'
code (``lancopku/Explicit-Sparse-Transformer``, commit fa0841d).

Shapes: B batch, H heads, T positions of a block, L maximal span, S = length of the cache, D width
per head, M model width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from separata_shared.nn import FeedForward, PostNorm
from torch import Tensor, nn

_TRIM_STEP = 64  # spans are cut in these steps, and caches keep one step more than is in use


def skew(weights: Tensor) -> Tensor:
    """Shift row i of ``(..., T, L)`` by i places to the right: ``(..., T, L + T)``, zeros around.

    Column j of the result belongs to position j of the cache followed by the block.
    """
    rows, span = weights.shape[-2:]
    padded = F.pad(weights, (0, rows + 1)).flatten(-2)  # (..., T * (L + T + 1))
    return padded[..., :-rows].reshape(*weights.shape[:-1], span + rows)


def unskew(scores: Tensor) -> Tensor:
    """Undo ``skew``: take entries i to i + L - 1 of row i of ``(..., T, L + T)``."""
    rows, columns = scores.shape[-2:]
    padded = F.pad(scores.flatten(-2), (0, rows))
    return padded.reshape(*scores.shape[:-1], columns + 1)[..., : columns - rows]


def every_key(num_keys: int) -> int | None:
    """Keep all keys, however many there are."""
    return None


class AdaptiveSpan(nn.Module):
    """Soft mask over the past with a learned length per head, then top-k, then renormalisation.

    ``m_j = clamp((1 - L + j + z L) / R + 1, 0, 1)`` for place j of L (Sukhbaatar et al. 2019,
    Eq. 6); the weights times m lose all but their k largest and are divided by their sum.

    Args:
        max_span: Longest span L.
        num_heads: Heads H, each with a span of its own.
        ramp: Length R of the soft edge.
        initial: Share of ``max_span`` to begin with.
        top_k: Number of keys to keep among a number of keys; None keeps all. For example
            ``functools.partial(official_top_k, -8, 0)``.
    """

    def __init__(
        self,
        max_span: int,
        *,
        num_heads: int,
        ramp: int = 32,
        initial: float = 0.0,
        top_k: Callable[[int], int | None] = every_key,
    ) -> None:
        super().__init__()
        self.max_span = max_span
        self.ramp = ramp
        self.top_k = top_k
        self.share = nn.Parameter(torch.full((num_heads, 1, 1), initial))

    def mask(self, span: int) -> Tensor:
        """The soft mask of the last ``span`` places: ``(H, 1, span)``."""
        places = torch.arange(1 - span, 1, device=self.share.device, dtype=self.share.dtype)
        return ((places + self.share * self.max_span) / self.ramp + 1).clamp(0, 1)

    def forward(self, weights: Tensor) -> Tensor:
        """Shorten, select and renormalise weights ``(B, H, T, L)``, or a shorter last part of L."""
        weights = weights * self.mask(weights.shape[-1])
        top_k = self.top_k(weights.shape[-1])
        if top_k is not None and top_k < weights.shape[-1]:
            # With fewer than k positive weights the threshold is 0 and nothing is removed.
            threshold = weights.detach().topk(top_k, dim=-1).values[..., -1:]
            weights = weights.masked_fill(weights < threshold, 0.0)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)

    def loss(self) -> Tensor:
        """Mean span in positions, to be weighted and added to the loss: ``L mean(z)``."""
        return self.max_span * self.share.mean()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the learned shares back to [0, 1]; to be called after each update."""
        self.share.clamp_(0, 1)

    def longest(self) -> int:
        """Span of the furthest-looking head in positions, ramp included."""
        return self._positions(self.share.max())

    def average(self) -> int:
        """Span of the mean share in positions, ramp included."""
        return self._positions(self.share.mean())

    def _positions(self, share: Tensor) -> int:
        span = math.ceil(share.item() * self.max_span) + self.ramp
        return max(0, min(self.max_span, span))

    def trimmed(self) -> int:
        """Furthest places of the span that no head uses and that need not be computed."""
        unused = min(self.max_span - 1, self.max_span - self.longest())
        return unused // _TRIM_STEP * _TRIM_STEP

    def cache_length(self) -> int:
        """Positions S worth keeping for the next block."""
        return min(self.max_span, self.max_span - self.trimmed() + _TRIM_STEP)


class SpanAttention(nn.Module):
    """Multi-head attention of a block to the L positions before each of its own.

    Args:
        width: Model width M.
        num_heads: Heads H; divides ``width``.
        span: Adaptive span of the heads.
        dropout: Dropout on the weights.
    """

    def __init__(
        self, width: int, num_heads: int, *, span: AdaptiveSpan, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide the width ({width})")
        self.num_heads = num_heads
        self.span = span
        self.dropout = nn.Dropout(dropout)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Tensor, key_positions: Tensor) -> Tensor:
        """Attend.

        Args:
            x: The block ``(B, T, M)``.
            cache: The positions before it ``(B, S, M)``; missing ones count as zeros.
            key_positions: Learned key of each relative position ``(D, L)``, shared by the heads.

        Returns:
            ``(B, T, M)``.
        """
        span = self.span.max_span - self.span.trimmed()
        past = torch.cat([cache, x], dim=1)
        wanted = span + x.shape[1]
        past = F.pad(past[:, -wanted:], (0, 0, max(wanted - past.shape[1], 0), 0))
        query, key, value = (
            projection(states).reshape(*states.shape[:2], self.num_heads, -1).transpose(1, 2)
            for projection, states in ((self.q_proj, x), (self.k_proj, past), (self.v_proj, past))
        )
        content = unskew(query @ key.mT)  # (B, H, T, span)
        position = query @ key_positions[:, -span:]
        scores = (content + position) / math.sqrt(query.shape[-1])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = self.dropout(self.span(scores.softmax(dim=-1)))
        output = skew(weights.to(value.dtype)) @ value
        projected: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return projected


class SpanLayer(nn.Module):
    """Sequential attention and feed-forward, each post-normalised.

    Args:
        attention: Called as ``attention(x, cache, key_positions)``.
        feed_forward: Called as ``feed_forward(x)``.
        residual: Makes the residual wiring of one sub-layer; called twice.
    """

    def __init__(
        self,
        attention: SpanAttention,
        feed_forward: nn.Module,
        *,
        residual: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_residual = residual()
        self.feed_forward = feed_forward
        self.feed_forward_residual = residual()

    def forward(self, x: Tensor, cache: Tensor, key_positions: Tensor) -> Tensor:
        """Map the block ``x (B, T, M)`` and the positions before it ``(B, S, M)``."""
        x = self.attention_residual(x, lambda y: self.attention(y, cache, key_positions))
        x = self.feed_forward_residual(x, self.feed_forward)
        return x


class SpanLanguageModel(nn.Module):
    """Character language model that reads a text block by block.

    Args:
        vocabulary_size: Symbols V.
        width: Model width M.
        num_heads: Heads H of every layer.
        layers: The stack; all spans have the same ``max_span``.
    """

    def __init__(
        self, vocabulary_size: int, *, width: int, num_heads: int, layers: Sequence[SpanLayer]
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.output = nn.Linear(width, vocabulary_size)
        self.layers = nn.ModuleList(layers)
        max_span = layers[0].attention.span.max_span
        self.key_positions = nn.Parameter(torch.randn(width // num_heads, max_span))

    @property
    def spans(self) -> list[AdaptiveSpan]:
        """The adaptive span of every layer."""
        return [module for module in self.modules() if isinstance(module, AdaptiveSpan)]

    def start(self, batch_size: int) -> list[Tensor]:
        """Empty caches ``(B, 0, M)``, one per layer: nothing has been read."""
        return [self.key_positions.new_zeros(batch_size, 0, self.width) for _ in self.layers]

    def forward(self, tokens: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Score the symbol after each of ``tokens``.

        Args:
            tokens: The next block of the text ``(B, T)``.
            caches: What the call for the block before returned, or ``start(B)``.

        Returns:
            Logits ``(B, T, V)`` and the caches for the next block, which carry no gradient.
        """
        x = self.embedding(tokens)
        kept = []
        for layer, cache, span in zip(self.layers, caches, self.spans, strict=True):
            kept.append(torch.cat([cache, x], dim=1)[:, -span.cache_length() :].detach())
            x = layer(x, cache, self.key_positions)
        return self.output(x), kept

    def span_loss(self) -> Tensor:
        """Sum over the layers of their mean span in positions."""
        return torch.stack([span.loss() for span in self.spans]).sum()

    def clamp_spans(self) -> None:
        """Bring the learned spans back to their range; to be called after each update."""
        for span in self.spans:
            span.clamp()


def build_span_language_model(
    vocabulary_size: int,
    *,
    width: int,
    hidden_width: int,
    num_heads: int,
    num_layers: int,
    dropout: float,
    span: Callable[[], AdaptiveSpan],
) -> SpanLanguageModel:
    """Compose the language model of Sukhbaatar et al. 2019.

    Args:
        vocabulary_size: Symbols V.
        width: Model width M.
        hidden_width: Inner width of the feed-forward layers.
        num_heads: Heads H.
        num_layers: Layers.
        dropout: Dropout on attention weights and feed-forward activations.
        span: Makes the adaptive span of one layer.

    Returns:
        The model, in training mode.
    """
    layers = [
        SpanLayer(
            SpanAttention(width, num_heads, span=span(), dropout=dropout),
            FeedForward(width, hidden_width, dropout=dropout),
            residual=partial(PostNorm, width),
        )
        for _ in range(num_layers)
    ]
    return SpanLanguageModel(vocabulary_size, width=width, num_heads=num_heads, layers=layers)
