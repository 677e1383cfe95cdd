"""What an experiment consists of: frozen dataclasses, checked when they are made.

A YAML file holds one group per dataclass: ``data``, ``recommender``, ``dialog`` and two of
``TrainConfig``, ``train`` for the recommender and ``train_dialog`` for the dialog model.
"""

from dataclasses import dataclass
from typing import Literal

Aggregate = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dialogs and which knowledge graph."""

    dataset: Literal["tiny", "sample", "redial"] = "tiny"
    """``tiny`` is made; ``sample`` is MovieLens-100k out of a pip package, its dialogs phrased from
    real ratings; ``redial`` is a directory of the official files."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""


@dataclass(frozen=True, kw_only=True)
class RecommenderConfig:
    """Sizes and choices of the recommender."""

    width: int = 128
    """Numbers in the vector of a node and of a user."""

    num_bases: int = 8
    """Bases that the weights of all relations are mixed from."""

    aggregate: Aggregate = "sum"
    """What a node does with its neighbours of one relation. ``sum`` is what the authors' library
    did in 2019, ``mean`` what the same code does with the library of today."""

    initialisation: Literal["uniform", "glorot"] = "uniform"
    """Of the graph layer: ``uniform`` as the authors' library did in 2019, ``glorot`` as today."""

    mentions: Literal["set", "list"] = "set"
    """Whether a node that is mentioned twice counts once or twice in the user vector."""

    batch_pairs: int = 256
    """Turn pairs of a training batch, those without a recommendation included."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("width", "num_bases", "batch_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"recommender.{name}: must be at least 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class DialogConfig:
    """Sizes and choices of the dialog model."""

    width: int = 300
    """Numbers in the vector of a token."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
