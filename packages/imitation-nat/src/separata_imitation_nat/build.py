"""From configuration to models, and from one model's parameters to another's.

The one place where a name in a YAML becomes a function.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from separata_shared.attention import Attend, dense_attention
from separata_shared.data.vocabulary import PAD
from separata_shared.nn import DecoderLayer, LearnedPositions, PostNorm, PreNorm, Transformer
from separata_shared.translation import TransformerConfig, build_transformer
from separata_shared.translation.model import Site, plain_layer, sinusoidal_positions
from torch import Tensor, nn
from torch.nn import functional as F

from .actions import (
    ActionDecoder,
    ActionLayer,
    Codebook,
    Combine,
    Concat,
    Gate,
    HardActions,
    SoftActions,
    add,
)
from .codebook import EMACodebook
from .config import ModelConfig
from .length import CLASSES, LengthHead, length_difference, unchanged
from .losses import BalanceRegulariser
from .model import (
    Demonstrator,
    Learner,
    MaskPredictor,
    NonAutoregressive,
    all_layers,
    top_layer,
    top_states,
    word_embeddings,
)
from .source_copy import SoftCopy, UniformCopy, ZeroCopy, soft_absolute, soft_relative


def all_positions(
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
    """Dense attention that looks both ways, whatever the decoder layer asks for."""
    return dense_attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout=dropout,
        return_weights=return_weights,
    )


def build_teacher(config: ModelConfig) -> Transformer:
    """Compose the plain Transformer that ``config`` describes."""
    return build_transformer(config, Transformer, **_parts(config))


def build_demonstrator(config: ModelConfig) -> Demonstrator:
    """Compose the demonstrator that ``config`` describes.

    Raises:
        ValueError: It has no actions.
    """
    if config.num_actions == 0:
        raise ValueError("model.num_actions: a demonstrator needs at least 1")
    balance = BalanceRegulariser(
        len(config.layers_with_actions), config.num_actions, decay=config.balance_decay
    )
    return build_transformer(
        config, partial(Demonstrator, balance=balance), **_parts(config), **_actions(config)
    )


def build_learner(config: ModelConfig) -> Learner:
    """Compose the learner that ``config`` describes."""
    copies: dict[str, Callable[[], nn.Module]] = {
        "soft_absolute": partial(SoftCopy, soft_absolute, start=config.copy_start),
        "soft_relative": partial(SoftCopy, soft_relative, start=config.copy_start),
        "uniform": UniformCopy,
        "zero": ZeroCopy,
    }
    kind = partial(
        Learner,
        copy=copies[config.copy](),
        copied_of={"states": top_states, "embeddings": word_embeddings}[config.copy_from],
        **_length(config),
    )
    learner = build_transformer(
        config, kind, attend=_both_ways, **_parts(config), **_actions(config)
    )
    if config.embeddings == "separate":
        # Nobody reads target words here, and a parameter without gradient stops several processes.
        learner.target.tokens = nn.Identity()
    return learner


def build_mask_predictor(config: ModelConfig) -> MaskPredictor:
    """Compose the mask-predict model that ``config`` describes; it has no actions."""
    kind = partial(MaskPredictor, **_length(config))
    return build_transformer(config, kind, attend=_both_ways, **_parts(config))


_MAY_BE_NEW = re.compile(r"^copy\.|^length\.|\.(action|action_residual|combine)\.")


def initialise(learner: NonAutoregressive, donor: nn.Module) -> list[str]:
    """Start a learner from a demonstrator or a teacher: copy the parameters of equal names.

    Args:
        learner: Changed in place.
        donor: Trained model of the same sizes.

    Returns:
        Names of the learner's parameters and buffers that the donor does not have.

    Raises:
        ValueError: A parameter has another shape, or the learner's encoder or decoder has parts
            that the donor lacks; the message names one.
    """
    given, own = donor.state_dict(), learner.state_dict()
    for name in own:  # in the model's order, so that the message is the same every time
        if name in given and given[name].shape != own[name].shape:
            raise ValueError(
                f"{name}: is {tuple(given[name].shape)} in the model to start from, but "
                f"{tuple(own[name].shape)} in the learner"
            )
    missing = sorted(own.keys() - given.keys())
    for name in missing:
        if not _MAY_BE_NEW.search(name):
            raise ValueError(f"{name}: missing in the model to start from")
    learner.load_state_dict(given, strict=False)
    return missing


def _parts(config: ModelConfig) -> dict[str, Any]:
    """What all models take."""
    activations = {"relu": F.relu, "gelu": F.gelu}
    positions = {"sinusoidal": sinusoidal_positions, "learned": _learned_positions}
    return {
        "activation": activations[config.activation],
        "positions": positions[config.positions],
    }


def _learned_positions(config: TransformerConfig) -> nn.Module:
    return LearnedPositions(config.width, padding_index=PAD, max_length=config.max_length)


def _both_ways(site: Site, layer: int) -> Attend:
    return all_positions if site == "decoder_self" else dense_attention


def _length(config: ModelConfig) -> dict[str, Any]:
    """The length head, and how it gets its states out of the encoder."""
    first, num_classes = CLASSES[config.length_offset]
    head = LengthHead(
        config.width,
        num_classes,
        first_length=length_difference(first),
        read=Tensor.detach if config.length_detach else unchanged,
    )
    states = {"top": top_layer, "all": all_layers}
    return {"length": head, "run_encoder": states[config.length_from]}


def _actions(config: ModelConfig) -> dict[str, Any]:
    """A decoder whose layers have action modules where the configuration wants them."""
    if config.num_actions == 0:
        return {"decoder": ActionDecoder}
    codebooks = _codebooks(config)
    actions = {"soft": SoftActions, "hard": HardActions}
    combines: dict[str, Callable[[int], Combine]] = {
        "add": lambda width: add,
        "gate": Gate,
        "concat": Concat,
    }
    wirings = {"post": PostNorm, "pre": PreNorm}

    def layer(number: int, *parts: nn.Module, residual: Callable[[], nn.Module]) -> DecoderLayer:
        if number not in config.layers_with_actions:
            return plain_layer(number, *parts, residual=residual)
        return ActionLayer(
            *parts,
            residual=residual,
            action=actions[config.actions](config.width, next(codebooks)),
            combine=combines[config.combine](config.width),
            action_residual=wirings[config.normalisation](config.width),
        )

    return {"decoder_layer": layer, "decoder": ActionDecoder}


def _codebooks(config: ModelConfig) -> Iterator[Any]:
    """The codebook of each layer with actions, in order."""
    kind = {"soft": Codebook, "hard": EMACodebook}[config.actions]
    shared = kind(config.num_actions, config.width)
    for number, _ in enumerate(config.layers_with_actions):
        fresh = number > 0 and not config.share_codebook
        yield kind(config.num_actions, config.width) if fresh else shared
