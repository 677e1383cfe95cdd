"""What a translation experiment consists of: frozen dataclasses, checked when they are made.

A YAML file holds one group per dataclass (``model``, ``data``, ``train``, ``decode``).
"""

from dataclasses import dataclass
from typing import Literal

from separata_shared.translation import DataConfig, DecodeConfig, TransformerConfig

from .build import NormKind, check_norm

__all__ = ["DataConfig", "DecodeConfig", "ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """Sizes, wiring and norms of the encoder-decoder."""

    normalisation: Literal["post", "pre"] = "pre"
    """The norm after the residual sum, or before the sub-layer as in the paper."""

    norm: NormKind = "ada_norm"
    """Which norm."""

    C: float = 1.0
    """Mean of the scaling of ``ada_norm``."""

    scope: Literal["all", "final_only"] = "all"
    """Which norms are ``norm``: ``all`` as in the paper, or only the final norm of each stack, as
    the authors' released command trains; the others are then LayerNorm."""

    initialisation: Literal["xavier", "km"] = "xavier"
    """Attention weights: Xavier-uniform, or the authors' ``km``, Kaiming-uniform."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        check_norm("model", C=self.C, width=self.width)
        if self.scope == "final_only" and self.normalisation == "post":
            raise ValueError(
                "model.scope: final_only needs model.normalisation pre; stacks whose layers "
                "normalise after the sum have no final norm"
            )
