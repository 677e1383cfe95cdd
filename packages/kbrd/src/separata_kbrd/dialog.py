"""The dialog model of KBRD (Chen et al. 2019, arXiv:1908.05391, section 3.3).

A Transformer writes the answer; what the recommender knows about the user shifts the score of every
word. The recommender is not a part of this module: it hands over user vectors.

Shapes: B dialogs, S tokens read, T tokens written, V vocabulary, M model width, d numbers of a user
vector, G hypotheses of a dialog, N = B * G rows being decoded.
"""

from collections.abc import Callable
from functools import partial

import torch
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    DecoderState,
    Encoder,
    EncoderLayer,
    FeedForward,
    InputEmbedding,
    MultiHeadAttention,
    PostNorm,
    TokenEmbedding,
    Transformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .config import DialogConfig
from .words import NULL

Number = Callable[[Tensor, int], Tensor]
"""Positions (B, T) or (T) of tokens (B, T), so many of which came in earlier calls."""


def count_tokens(tokens: Tensor, offset: int) -> Tensor:
    """Number the tokens that are not padding, from 0: how the encoder counts."""
    return (tokens.ne(NULL).cumsum(dim=1) - 1).clamp(min=0) + offset


def count_places(tokens: Tensor, offset: int) -> Tensor:
    """Number the places, whatever stands there: how the decoder counts."""
    return torch.arange(offset, offset + tokens.size(1), device=tokens.device)


class Positions(nn.Module):
    """P[p, 2k] = sin(p / 10000^(2k/M)), P[p, 2k+1] = cos(the same); not trained.

    The table has the precision of float32 whatever the model has, as in the authors' code.

    Args:
        width: M.
        number: Gives each token its position.
        max_length: Rows of the table.
    """

    table: Tensor

    def __init__(self, width: int, *, number: Number, max_length: int) -> None:
        super().__init__()
        self.number = number
        k = torch.arange((width + 1) // 2, dtype=torch.float64)
        angles = torch.arange(max_length)[:, None] / 10000 ** (2 * k / width)
        table = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :width]
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, tokens: Tensor, *, offset: int = 0) -> Tensor:
        """Vectors of the positions of ``tokens (B, T)``.

        Raises:
            ValueError: There are more tokens than positions.
        """
        if offset + tokens.size(1) > len(self.table):
            raise ValueError(
                f"a text of {offset + tokens.size(1)} tokens is longer than the "
                f"{len(self.table)} positions of the model (dialog.max_length)"
            )
        return self.table[self.number(tokens, offset)]


class CleanLayer(nn.Module):
    """An encoder layer that reads and gives zeros at padding.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        """Map ``x (B, S, M)`` to ``(B, S, M)``; ``mask (B, 1, 1, S)`` is False at padding."""
        real = mask[:, 0, 0, :, None]
        output: Tensor = self.layer(x * real, mask=mask) * real
        return output


class DialogTransformer(Transformer):
    """The encoder-decoder; what has nothing to read attends to zeros instead of to nothing."""

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, M) and the mask (B, 1, 1, S) of the decoder for tokens (B, S)."""
        states, mask = super().encode(source)
        # An empty text attends evenly over its padding, whose states are zero.
        return states, mask | ~mask.any(dim=-1, keepdim=True)


class VocabularyBias(nn.Module):
    """v = W_2 relu(W_1 u + b_1) + b_2: what the user's taste adds to the score of each word.

    Args:
        user_width: d.
        hidden_width: Width between the layers.
        num_tokens: V.
    """

    def __init__(self, user_width: int, *, hidden_width: int, num_tokens: int) -> None:
        super().__init__()
        self.first = nn.Linear(user_width, hidden_width)
        self.second = nn.Linear(hidden_width, num_tokens)

    def forward(self, user: Tensor) -> Tensor:
        """Bias (B, V) of users (B, d), which gets no gradient through them."""
        v: Tensor = self.second(F.relu(self.first(user.detach())))
        return v


class DialogState:
    """What the model keeps between two steps of decoding.

    Attributes:
        decoder: State of the decoder.
        bias: Bias of each dialog (B, V), the same at every step.
    """

    def __init__(self, decoder: DecoderState, bias: Tensor) -> None:
        self.decoder = decoder
        self.bias = bias

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        """Rearrange the rows before the next step; see ``separata_shared.decoding.State``."""
        self.decoder.reorder(index, sentences)
        if sentences is not None:
            self.bias = self.bias[sentences]


class DialogModel(nn.Module):
    """Scores of the next word: X o_t + v, with X the one table of all embeddings.

    Args:
        config: Sizes.
        num_tokens: V.
        user_width: d.
    """

    def __init__(self, config: DialogConfig, *, num_tokens: int, user_width: int) -> None:
        super().__init__()
        self.transformer = _transformer(config, num_tokens)
        self.bias = VocabularyBias(
            user_width, hidden_width=config.bias_width, num_tokens=num_tokens
        )

    def forward(self, context: Tensor, written: Tensor, user: Tensor) -> Tensor:
        """Logits (B, T, V) of every next token.

        Args:
            context: Tokens of the dialog so far (B, S), padded.
            written: Start and the tokens of the answer (B, T), padded on the right.
            user: User vectors (B, d).
        """
        v: Tensor = self.bias(user)
        logits: Tensor = self.transformer(context, written) + v[:, None]
        return logits

    def start(self, context: Tensor, user: Tensor) -> DialogState:
        """Read the dialogs ``context (B, S)`` of the users ``(B, d)``."""
        return DialogState(self.transformer.start(context), self.bias(user))

    def step(self, tokens: Tensor, state: DialogState) -> Tensor:
        """Logits (N, V) after tokens (N); the rows of a dialog stand together."""
        logits: Tensor = self.transformer.step(tokens, state.decoder)
        hypotheses = len(logits) // len(state.bias)
        return logits + state.bias.repeat_interleave(hypotheses, dim=0)


def _transformer(config: DialogConfig, num_tokens: int) -> DialogTransformer:
    """The encoder-decoder with fresh parameters."""
    width, dropout = config.width, config.dropout
    table = TokenEmbedding(num_tokens, width=width, padding_index=NULL)
    residual = partial(PostNorm, width, dropout=dropout)

    def attention() -> MultiHeadAttention:
        return MultiHeadAttention(width, config.num_heads, dropout=config.attention_dropout)

    def feed_forward() -> FeedForward:
        return FeedForward(width, config.hidden_width, dropout=config.activation_dropout)

    def embedding(number: Number) -> InputEmbedding:
        positions = Positions(width, number=number, max_length=config.max_length)
        return InputEmbedding(table, positions, dropout=dropout)

    encoder = [
        CleanLayer(EncoderLayer(attention(), feed_forward(), residual=residual))
        for _ in range(config.encoder_layers)
    ]
    decoder = [
        DecoderLayer(attention(), attention(), feed_forward(), residual=residual)
        for _ in range(config.decoder_layers)
    ]
    model = DialogTransformer(
        source=embedding(count_tokens),
        encoder=Encoder(encoder),
        target=embedding(count_places),
        decoder=Decoder(decoder),
        output=table.project,
        padding_index=NULL,
    )
    _initialise(model)
    return model


def _initialise(model: nn.Module) -> None:
    """Attention Xavier normal, biases of all layers as torch draws them: the authors' code."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                projection.reset_parameters()
                nn.init.xavier_normal_(projection.weight)
        elif isinstance(module, FeedForward):
            for layer in (module.fc1, module.fc2):
                layer.reset_parameters()
                nn.init.xavier_uniform_(layer.weight)
