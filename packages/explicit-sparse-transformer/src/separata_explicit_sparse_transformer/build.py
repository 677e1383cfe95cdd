"""From configuration to model: the one place where a name in a YAML becomes a function."""

from collections.abc import Callable
from functools import partial

import torch
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.data.vocabulary import PAD
from separata_shared.nn import (
    Decoder,
    Encoder,
    PostNorm,
    PreNorm,
    SinusoidalPositions,
    TokenEmbedding,
)
from torch import Tensor, nn

from . import patterns, selection
from .config import AttentionConfig, ModelConfig, Site
from .model import (
    AttendFactory,
    ExplicitSparseTransformer,
    InputEmbedding,
    TopKAttention,
    decoder_layer,
    encoder_layer,
)


def build_model(
    config: ModelConfig, *, attend: AttendFactory | None = None
) -> ExplicitSparseTransformer:
    """Compose the model that ``config`` describes, with fresh parameters.

    Args:
        config: Sizes and wiring; the vocabulary sizes must be set.
        attend: Gives the attention of each site and layer; default: what the configuration says.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: A vocabulary size is missing, or tables of different sizes shall be shared.
    """
    source, target, output = _tables(config)
    attend = attend or attend_factory(config.attention)
    residuals = {"post": PostNorm, "pre": PreNorm}
    residual = partial(residuals[config.normalisation], config.width, dropout=config.dropout)
    final_norm: Callable[[], nn.Module | None] = {
        "post": lambda: None,
        "pre": lambda: nn.LayerNorm(config.width),
    }[config.normalisation]
    return ExplicitSparseTransformer(
        source=InputEmbedding(source, _positions(config), dropout=config.dropout),
        encoder=Encoder(
            [
                encoder_layer(config, attend("encoder_self", n), residual)
                for n in range(config.encoder_layers)
            ],
            final_norm=final_norm(),
        ),
        target=InputEmbedding(target, _positions(config), dropout=config.dropout),
        decoder=Decoder(
            [
                decoder_layer(config, attend("decoder_self", n), attend("cross", n), residual)
                for n in range(config.decoder_layers)
            ],
            final_norm=final_norm(),
        ),
        output=output,
        padding_index=PAD,
    )


def _positions(config: ModelConfig) -> SinusoidalPositions:
    return SinusoidalPositions(config.width, padding_index=PAD, max_length=config.max_length)


def _tables(
    config: ModelConfig,
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


def attend_factory(config: AttentionConfig) -> AttendFactory:
    """The attention of every site and layer as ``config`` says; sites not named are dense."""

    def attend(site: Site, layer: int) -> Attend:
        if site not in config.sites:
            return dense_attention
        kinds = _KINDS | _CAUSAL_KINDS if site == "decoder_self" else _KINDS
        sparse = kinds[config.kind](config, layer)
        if sparse is dense_attention:
            return sparse
        if config.phase == "train":
            return selection.PhaseSwitch(train=sparse, predict=dense_attention)
        if config.phase == "predict":
            return selection.PhaseSwitch(train=dense_attention, predict=sparse)
        return sparse

    return attend


def _top_k(config: AttentionConfig, layer: int) -> int | Tensor:
    """K of one layer: a number, or one per head as (H, 1)."""
    top_k = config.top_k[layer] if isinstance(config.top_k, list) else config.top_k
    return torch.tensor(top_k)[:, None] if isinstance(top_k, list) else top_k


def _after_scores(normalise: Callable[..., Tensor]) -> Callable[[AttentionConfig, int], Attend]:
    """A rule on score matrices as an attention with the k of its layer."""
    return lambda config, layer: selection.attention_with(
        partial(normalise, top_k=_top_k(config, layer), ties=config.ties)
    )


def _pattern(choose: Callable[..., Tensor]) -> Callable[[AttentionConfig, int], Attend]:
    """A fixed pattern of k keys per query as an attention."""
    return lambda config, layer: patterns.pattern_attention(
        partial(choose, top_k=_one_number(config, layer))
    )


def _one_number(config: AttentionConfig, layer: int) -> int:
    top_k = _top_k(config, layer)
    assert isinstance(top_k, int)  # as the configuration checks
    return top_k


_KINDS: dict[str, Callable[[AttentionConfig, int], Attend]] = {
    "topk": lambda config, layer: TopKAttention(_top_k(config, layer), ties=config.ties),
    "ratio": lambda config, layer: partial(
        topk_attention, ratio=config.ratio, min_keys=config.min_keys, ties=config.ties
    ),
    "official_ratio": lambda config, layer: partial(
        selection.official_ratio_attention, div=config.ratio, lower_bound=config.min_keys
    ),
    "dense": lambda config, layer: dense_attention,
    "sparsemax": lambda config, layer: selection.sparsemax_attention,
    "entmax15": lambda config, layer: selection.entmax15_attention,
    "straight_through": _after_scores(selection.straight_through_topk_softmax),
    "softmax_topk": _after_scores(selection.softmax_topk),
    "softmax_topk_softmax": _after_scores(selection.softmax_topk_softmax),
    "selection_before_masking": _after_scores(selection.selection_before_masking_softmax),
    "joint_heads": _after_scores(selection.joint_heads_topk_softmax),
    "out_of_window": lambda config, layer: patterns.out_of_window_attention(
        _one_number(config, layer)
    ),
    "window": _pattern(patterns.window),
    "block": _pattern(patterns.block),
    "dilated": _pattern(patterns.dilated),
    "global": _pattern(patterns.global_keys),
    "random": _pattern(patterns.random_keys),
    "big_bird": _pattern(patterns.big_bird),
}

# Where no query looks ahead, a window centred on the query would waste half of its keys.
_CAUSAL_KINDS: dict[str, Callable[[AttentionConfig, int], Attend]] = {
    "out_of_window": lambda config, layer: patterns.out_of_window_attention(
        _one_number(config, layer), local=patterns.causal_window
    ),
    "window": _pattern(patterns.causal_window),
}
