"""What a model and its decoding consist of: frozen dataclasses, checked when they are made.

A YAML file holds one group per dataclass (``model``, ``data``, ``train``, ``decode``, ...).
"""

import math
from dataclasses import dataclass
from typing import Literal

from separata_shared.translation import DataConfig, DecodeConfig, TransformerConfig

__all__ = [
    "DataConfig",
    "DecodeConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParallelDecodeConfig",
    "StagesConfig",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """Sizes and wiring of demonstrator, learner, teacher and mask-predict model alike.

    Each model reads the fields that concern it: a teacher has no actions, only a learner copies.
    """

    activation: Literal["relu", "gelu"] = "relu"
    """Between the two layers of every feed-forward network."""

    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Fixed positions, or a table for each side."""

    num_actions: int = 512
    """Actions K of each layer; 0 leaves the action modules out."""

    action_layers: Literal["all", "last"] | list[int] = "all"
    """Decoder layers with an action module: all, the last, or those of a list, from 0."""

    actions: Literal["soft", "hard"] = "soft"
    """``soft``: every state mixes all actions, as in the paper. ``hard``: the nearest entry of a
    codebook that follows the states as a moving average."""

    combine: Literal["add", "gate", "concat"] = "add"
    """How the action vector u enters the state r: ``r + u``, ``r + g * u`` with a gate of both, or
    ``r + W [r; u]``; always before the layer's norm."""

    share_codebook: bool = False
    """One codebook for all layers instead of one for each."""

    balance_decay: float = 0.9
    """How much of the running mean activation c of the actions an update keeps (alpha)."""

    copy: Literal["soft_absolute", "soft_relative", "uniform", "zero"] = "soft_absolute"
    """What the learner's decoder reads: the softly copied source as in the paper, the same by
    relative position, a source position for each target position, or nothing."""

    copy_from: Literal["states", "embeddings"] = "states"
    """What is copied: the top encoder states, or the scaled word embeddings of the source."""

    copy_start: float = 1.0
    """Start of the trained tau of ``soft_absolute``, or of the temperature of ``soft_relative``."""

    length_offset: Literal[128, 20] = 128
    """Classes of the length head: T - S from -128 to 127, or from -20 to 20."""

    length_from: Literal["top", "all"] = "top"
    """What the length head averages over the source: the encoder's top states, or the sum of what
    all its layers put out, as the code that the paper follows. Which of them the paper has is not
    known."""

    length_detach: bool = False
    """Keep the gradient of the length loss from the encoder."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        if self.num_actions < 0:
            raise ValueError(f"model.num_actions: must not be negative, got {self.num_actions}")
        if isinstance(self.action_layers, list):
            layers = self.action_layers
            fitting = all(0 <= number < self.decoder_layers for number in layers)
            if not layers or not fitting or len(set(layers)) < len(layers):
                raise ValueError(
                    f"model.action_layers: needs different numbers from 0 to "
                    f"{self.decoder_layers - 1}, got {layers}"
                )
        if not 0 <= self.balance_decay < 1:
            raise ValueError(f"model.balance_decay: must be in [0, 1), got {self.balance_decay}")
        if not (math.isfinite(self.copy_start) and self.copy_start > 0):
            raise ValueError(f"model.copy_start: must be a positive number, got {self.copy_start}")

    @property
    def layers_with_actions(self) -> list[int]:
        """Numbers of the decoder layers that have an action module, ascending."""
        if self.num_actions == 0:
            return []
        if isinstance(self.action_layers, list):
            return sorted(self.action_layers)
        return (
            list(range(self.decoder_layers))
            if self.action_layers == "all"
            else [self.decoder_layers - 1]
        )


@dataclass(frozen=True, kw_only=True)
class ParallelDecodeConfig:
    """How a learner decodes: which lengths, and who chooses among them."""

    lengths: Literal["window", "top_k", "source"] = "window"
    """Lengths around the most likely one, the most likely lengths, or lengths around the source's
    own, which do without the length head. That the paper's window is the first is remembered, not
    checked."""

    radius: int = 3
    """Half width dT of the windows: ``2 dT + 1`` candidates; 0 decodes their centre alone."""

    offset: int = 0
    """With ``lengths`` source: what is added to the source's length, such as the mean of T - S in
    the training text."""

    top_k: int = 5
    """Candidates with ``lengths`` top_k."""

    scorer: Literal["teacher", "self", "none"] = "teacher"
    """Who scores the candidates: the teacher, the learner itself, or nobody, which decodes the most
    likely length alone (with ``lengths`` source: the source's length plus ``offset``)."""

    collapse: bool = False
    """Remove a token that repeats the one before it, after the choice."""

    max_tokens: int = 4000
    """Padded source tokens of one batch times candidates."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if self.radius < 0:
            raise ValueError(f"parallel.radius: must not be negative, got {self.radius}")
        for name in ("top_k", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: must be at least 1, got {getattr(self, name)}")

    @property
    def candidates(self) -> int:
        """Lengths decoded for each sentence."""
        if self.scorer == "none":
            return 1
        return self.top_k if self.lengths == "top_k" else 2 * self.radius + 1


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the losses beside the words'."""

    balance: float = 0.001
    """Weight of the balance regulariser of the demonstrator (lambda_1)."""

    imitation: float = 0.001
    """Weight of the imitation loss of the learner (lambda_2); 0 trains without a demonstrator."""

    length: float = 0.1
    """Weight of the loss of the learner's length head."""

    commitment: float = 0.25
    """With hard actions: weight of the distance between a state and its action."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("balance", "imitation", "length", "commitment"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"objective.{name}: must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """What the stages of the pipeline hand to each other."""

    targets: Literal["distilled", "raw"] = "distilled"
    """Training targets of demonstrator and learner: the teacher's translations, or the corpus's."""

    initialise: Literal["demonstrator", "teacher", "none"] = "demonstrator"
    """Where the learner's parameters start: everything that both models have comes from there."""

    teacher_steps: int = 0
    """Steps of the teacher; 0 for those of ``train``."""

    demonstrator_steps: int = 0
    """Steps of the demonstrator; 0 for those of ``train``."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("teacher_steps", "demonstrator_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"stages.{name}: must not be negative, got {getattr(self, name)}")
