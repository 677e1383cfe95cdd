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
    """Sizes and choices of the dialog model, and how it writes."""

    width: int = 300
    """Numbers in the vector of a token."""

    num_heads: int = 2
    """Attention heads."""

    hidden_width: int = 300
    """Inner width of the feed-forward layers."""

    encoder_layers: int = 2
    """Layers that read."""

    decoder_layers: int = 2
    """Layers that write."""

    bias_width: int = 512
    """Inner width of the two layers between the user vector and the bias of the words."""

    dropout: float = 0.1
    """Dropout after each sub-layer and on the embeddings."""

    attention_dropout: float = 0.0
    """Dropout on the attention weights."""

    activation_dropout: float = 0.1
    """Dropout after the activation of the feed-forward layers."""

    max_length: int = 1024
    """Tokens kept of what was said before (the last ones) and of an answer (the first ones)."""

    mentions: Literal["set", "list"] = "set"
    """Whether a node that is mentioned twice counts once or twice in the user vector. The authors'
    dialog model has ``list`` where their recommender has ``set``."""

    batch_pairs: int = 64
    """Turn pairs of a training batch."""

    search: Literal["batched", "official"] = "batched"
    """Rules of the search: ours, or those of the authors' code with their flaws."""

    beam: int = 1
    """Hypotheses kept for each answer; 1 is greedy search."""

    min_length: int = 1
    """Fewest tokens of an answer."""

    max_reply: int = 40
    """Most tokens of an answer."""

    block_ngram: int = 0
    """No n-gram of this length comes twice in an answer; 0 allows everything. With ``official`` any
    number above 1 forbids every repeated word, and one beam pays no attention to it."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        sizes = ("width", "num_heads", "hidden_width", "encoder_layers", "decoder_layers")
        for name in (*sizes, "bias_width", "batch_pairs", "beam", "max_reply"):
            if getattr(self, name) < 1:
                raise ValueError(f"dialog.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("min_length", "block_ngram"):
            if getattr(self, name) < 0:
                raise ValueError(f"dialog.{name}: must not be negative, is {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"dialog.{name}: must be in [0, 1), got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(
                f"dialog.num_heads: {self.num_heads} heads do not divide width {self.width}"
            )
        if self.min_length > self.max_reply:
            raise ValueError(
                f"dialog.min_length: {self.min_length} is more than dialog.max_reply "
                f"{self.max_reply}"
            )
        if self.max_length < self.max_reply + 1:
            raise ValueError(
                f"dialog.max_length: {self.max_length} positions cannot hold an answer of "
                f"{self.max_reply} tokens and its end"
            )
