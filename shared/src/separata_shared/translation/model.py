"""From the settings of a Transformer to the model; what varies is handed in."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from separata_shared.attention import Attend, dense_attention
from separata_shared.data.vocabulary import PAD
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    InputEmbedding,
    MultiHeadAttention,
    PostNorm,
    PreNorm,
    SinusoidalPositions,
    TokenEmbedding,
)
from separata_shared.nn.residual import Norm
from separata_shared.translation.config import TransformerConfig

Site = Literal["encoder_self", "decoder_self", "cross"]
AttendFactory = Callable[[Site, int], Attend]
"""Gives the attention function of one site in one layer."""

DecoderLayerFactory = Callable[..., DecoderLayer]
"""Makes decoder layer ``n``: called like ``DecoderLayer``, with ``n`` before its arguments."""

ModelT = TypeVar("ModelT", bound=nn.Module)


def dense_everywhere(site: Site, layer: int) -> Attend:
    """Dense attention at every site of every layer."""
    return dense_attention


def plain_layer(number: int, *parts: nn.Module, residual: Callable[[], nn.Module]) -> DecoderLayer:
    """The Transformer's own decoder layer, the same for every number."""
    return DecoderLayer(*parts, residual=residual)


def sinusoidal_positions(config: TransformerConfig) -> nn.Module:
    """Fixed positions of the model's width."""
    return SinusoidalPositions(config.width, padding_index=PAD, max_length=config.max_length)


def build_transformer(
    config: TransformerConfig,
    kind: Callable[..., ModelT],
    *,
    attend: AttendFactory = dense_everywhere,
    norm: Norm = nn.LayerNorm,
    final_norm: Norm | None = None,
    activation: Callable[[Tensor], Tensor] = F.relu,
    positions: Callable[[TransformerConfig], nn.Module] = sinusoidal_positions,
    decoder_layer: DecoderLayerFactory = plain_layer,
    decoder: Callable[..., Decoder] = Decoder,
) -> ModelT:
    """Compose the model that ``config`` describes, with fresh parameters.

    Args:
        config: Sizes and wiring; the vocabulary sizes must be set.
        kind: Class of the model, or a function called like ``Transformer``.
        attend: Gives the attention of each site and layer.
        norm: Makes every norm for a width.
        final_norm: Makes the norm after each stack of a pre-norm model; None for ``norm``.
        activation: Between the two layers of every feed-forward network.
        positions: Makes the positions of one side.
        decoder_layer: Makes each layer of the decoder.
        decoder: Class of the decoder.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: A vocabulary size is missing, or tables of different sizes shall be shared.
    """
    source, target, output = _tables(config)
    residuals = {"post": PostNorm, "pre": PreNorm}
    residual = partial(
        residuals[config.normalisation], config.width, norm=norm, dropout=config.dropout
    )
    last_norm = partial(final_norm or norm, config.width)
    encoder_layers = [
        EncoderLayer(
            _attention(config, attend("encoder_self", n)),
            _feed_forward(config, activation),
            residual=residual,
        )
        for n in range(config.encoder_layers)
    ]
    decoder_layers = [
        decoder_layer(
            n,
            _attention(config, attend("decoder_self", n)),
            _attention(config, attend("cross", n)),
            _feed_forward(config, activation),
            residual=residual,
        )
        for n in range(config.decoder_layers)
    ]
    is_pre = config.normalisation == "pre"
    return kind(
        source=InputEmbedding(source, positions(config), dropout=config.dropout),
        encoder=Encoder(encoder_layers, final_norm=last_norm() if is_pre else None),
        target=InputEmbedding(target, positions(config), dropout=config.dropout),
        decoder=decoder(decoder_layers, final_norm=last_norm() if is_pre else None),
        output=output,
        padding_index=PAD,
    )


def _attention(config: TransformerConfig, attend: Attend) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.width, config.num_heads, attend=attend, dropout=config.attention_dropout
    )


def _feed_forward(config: TransformerConfig, activation: Callable[[Tensor], Tensor]) -> FeedForward:
    return FeedForward(
        config.width,
        config.hidden_width,
        activation=activation,
        dropout=config.activation_dropout,
    )


def _tables(
    config: TransformerConfig,
) -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
    """Source table, target table and output projection, shared as configured."""
    for name in ("source_vocabulary_size", "target_vocabulary_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}: must be set before a model can be built")
    target = TokenEmbedding(config.target_vocabulary_size, width=config.width, padding_index=PAD)
    if config.embeddings == "joint":
        if config.source_vocabulary_size != config.target_vocabulary_size:
            raise ValueError(
                "model.embeddings: joint tables need one vocabulary, but the source has "
                f"{config.source_vocabulary_size} types and the target "
                f"{config.target_vocabulary_size}"
            )
        return target, target, target.project
    source = TokenEmbedding(config.source_vocabulary_size, width=config.width, padding_index=PAD)
    if config.embeddings == "target":
        return source, target, target.project
    output = nn.Linear(config.width, config.target_vocabulary_size, bias=False)
    nn.init.normal_(output.weight, std=config.width**-0.5)
    return source, target, output
