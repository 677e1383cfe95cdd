"""Explicit Sparse Transformer.

Zhao, Lin, Zhang, Ren, Su, Sun: "Explicit Sparse Transformer: Concentrated Attention Through
Explicit Selection", arXiv:1912.11637. The equations are numbered here in the order in which the
method needs them; the numbers are ours.

    Eq. 1   P = Q K^T / sqrt(D)                              scores, (B,H,T,S)
    Eq. 2   t_i = the k-th largest allowed P_ij of row i     threshold, (B,H,T)
    Eq. 3   M_ij = P_ij if P_ij >= t_i, else -inf            selection
    Eq. 4   A = softmax(M)                                   weights, zero outside the selection
    Eq. 5   C = A V                                          output, (B,H,T,D)
    Eq. 6   Q, K, V from the same states                     self-attention
    Eq. 7   Q from the target, K and V from the source       context attention
    Eq. 8   p(y_t | y_<t, x) = softmax(W h_t)                next token

Shapes: B batch, T target length (queries), S source length (keys), H heads, D width per head,
M model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    DecoderState,
    Encoder,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    padding_mask,
)
from torch import Tensor, nn

from .config import ModelConfig, Site

AttendFactory = Callable[[Site, int], Attend]
"""Gives the attention function of one site in one layer."""


class TopKAttention(nn.Module):
    """Softmax attention over the k highest-scoring keys of each query.

    Args:
        top_k: Keys kept per query; a number, or one number per head as a tensor (H, 1).
        ties: ``"keep"`` keeps every key equal to the k-th score, ``"exact"`` exactly k keys.
    """

    def __init__(self, top_k: int | Tensor, *, ties: Literal["keep", "exact"] = "keep") -> None:
        super().__init__()
        self.top_k = top_k
        self.ties = ties

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        """Attend from ``query`` (B,H,T,D) to ``key`` (B,H,S,D) and ``value`` (B,H,S,D).

        The five equations run fused; ``separata_shared.attention.topk.reference`` spells them out.
        Masks come before the selection: a key that may not be attended takes nobody's place.
        """
        return topk_attention(
            query,
            key,  # Eq. 1
            value,  # Eq. 5
            top_k=self.top_k,  # Eq. 2
            ties=self.ties,  # Eq. 3
            **options,  # mask, bias, causal; dropout acts on the result of Eq. 4
        )

    def extra_repr(self) -> str:
        """Show k when the model is printed."""
        return f"top_k={self.top_k}, ties={self.ties!r}"


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
        """Embed ``tokens`` (B,T), the first of which stands at position ``offset``: (B,T,M)."""
        embedded: Tensor = self.dropout(self.tokens(tokens) + self.positions(tokens, offset=offset))
        return embedded


def encoder_layer(
    config: ModelConfig, attend: Attend, residual: Callable[[], nn.Module]
) -> EncoderLayer:
    """One encoder layer: explicit sparse self-attention, then the feed-forward network."""
    return EncoderLayer(
        _attention(config, attend),  # Eq. 6
        _feed_forward(config),
        residual=residual,
    )


def decoder_layer(
    config: ModelConfig,
    self_attend: Attend,
    cross_attend: Attend,
    residual: Callable[[], nn.Module],
) -> DecoderLayer:
    """One decoder layer: self-attention as in the encoder, context attention, feed-forward."""
    return DecoderLayer(
        _attention(config, self_attend),
        _attention(config, cross_attend),  # Eq. 7
        _feed_forward(config),
        residual=residual,
    )


def _attention(config: ModelConfig, attend: Attend) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.width, config.num_heads, attend=attend, dropout=config.attention_dropout
    )


def _feed_forward(config: ModelConfig) -> FeedForward:
    return FeedForward(config.width, config.hidden_width, dropout=config.activation_dropout)


class ExplicitSparseTransformer(nn.Module):
    """Encoder-decoder whose attentions are those it was built with.

    ``build_model(ModelConfig(...))`` composes one; the parts are arguments so that any of them
    can be another module.

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
            source: Tokens (B,S), padded on either side.

        Returns:
            States (B,S,M) and the mask (B,1,1,S) of the positions that may be attended.
        """
        mask = padding_mask(source, self.padding_index)
        return self.encoder(self.source(source), mask=mask), mask

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score every next token given the true tokens before it.

        Args:
            source: Source tokens (B,S).
            target: Decoder input (B,T): the target sentence moved one place to the right.

        Returns:
            Logits (B,T,V).
        """
        memory, mask = self.encode(source)
        states = self.decoder(self.target(target), memory, memory_mask=mask)
        return self.output(states)  # Eq. 8

    def start(self, source: Tensor) -> DecoderState:
        """Encode ``source`` (B,S) and make the state of a decoder that has read nothing yet."""
        memory, mask = self.encode(source)
        return self.decoder.start(memory, memory_mask=mask)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Score the tokens after ``tokens`` (N,): logits (N,V); N is a multiple of B.

        ``state`` is updated in place.
        """
        embedded = self.target(tokens[:, None], offset=state.length)
        return self.output(self.decoder.step(embedded, state)[:, -1])


def sparse_attentions(model: nn.Module) -> dict[str, MultiHeadAttention]:
    """The attentions of ``model`` that are not dense, by name: 18 in a model of 6+6 layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention) and module.attend is not dense_attention
    }


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Let every explicit sparse attention of ``model`` keep ``top_k`` keys from now on."""
    for module in model.modules():
        if isinstance(module, TopKAttention):
            module.top_k = top_k
