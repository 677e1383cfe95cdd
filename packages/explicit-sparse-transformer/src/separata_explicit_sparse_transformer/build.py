"""From configuration to model: the one place where a name in a YAML becomes a function."""

from collections.abc import Callable
from functools import partial

import torch
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.translation.model import AttendFactory, Site, build_transformer
from torch import Tensor

from . import patterns, selection
from .config import AttentionConfig, ModelConfig
from .model import ExplicitSparseTransformer, TopKAttention


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
    return build_transformer(
        config, ExplicitSparseTransformer, attend=attend or attend_factory(config.attention)
    )


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
