"""What an experiment consists of: frozen dataclasses, checked when they are made.

A YAML file holds one group per dataclass: ``data``, ``recommender``, ``dialog`` and two of
``TrainConfig``, ``train`` for the recommender and ``train_dialog`` for the dialog model.
"""

from dataclasses import dataclass, field
from typing import Literal

Aggregate = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dialogs and which knowledge graph, and how they become numbers."""

    dataset: Literal["tiny", "sample", "redial"] = "tiny"
    """``tiny`` is made; ``sample`` is MovieLens-100k out of a pip package, its dialogs phrased from
    real ratings; ``redial`` is a directory of dialogs as ReDial writes them, and a graph."""

    raw: str = "data/redial"
    """Directory of the downloaded files, for ``redial``. Each may be compressed (``.gz``, ``.xz``);
    dialogs may also be inside ``redial_dataset.zip``."""

    prepared: str = "prepared/redial"
    """Directory that ``prepare`` writes and the other commands read; ``tiny`` needs none."""

    train_files: list[str] = field(default_factory=lambda: ["train_data.jsonl"])
    """Training dialogs in ``raw``."""

    valid_files: list[str] = field(default_factory=list)
    """Validation dialogs in ``raw``; without any, some training dialogs are taken."""

    test_files: list[str] = field(default_factory=lambda: ["test_data.jsonl"])
    """Test dialogs in ``raw``."""

    train_share: float = 0.9
    """Share of the training dialogs that stays for training if there are no ``valid_files``."""

    split_seed: int = 1
    """Seed of the choice of validation dialogs, or of the made data."""

    graph: Literal["auto", "npz", "pickles", "tsv", "dbpedia"] = "auto"
    """Form of the graph in ``raw``: numbers in an array, the authors' pickles, a table of names, or
    the dumps of DBpedia to build it from. ``auto`` takes the first that is there."""

    self_loop: int | None = None
    """Number of the relation between a node and itself, if the graph's files do not name it; by
    default the one with most triples of a node with itself."""

    threshold: int = 1000
    """A relation needs more edges than this."""

    links: Literal["names", "table", "spotlight", "none"] = "names"
    """How messages are linked to nodes: by the names of the nodes, by a table in ``raw``, by a
    DBpedia Spotlight service, or not at all."""

    link_table: str = "text_dict.pkl"
    """With ``table``: the file in ``raw``, JSON from text to URIs or the authors' pickle."""

    spotlight_url: str = ""
    """With ``spotlight``: address of the service; messages are sent there."""

    slots: Literal["separate", "shared"] = "separate"
    """Whether an item and an unknown word in a text are two tokens, or one as in the authors'
    code."""

    dictionary: str | None = None
    """Dictionary of ParlAI whose words the dialogs are numbered by; default: the words of the
    training dialogs. Needed for dialog models of the authors' code."""

    tiny_dialogs: int = 240
    """Training dialogs of the made data; a quarter as many for each other part."""

    tiny_items: int = 48
    """Items of the made data."""

    sample_dialogs: int = 2000
    """Most dialogs of the sample, all parts together."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("tiny_dialogs", "tiny_items", "sample_dialogs"):
            if getattr(self, name) < 16:
                raise ValueError(f"data.{name}: must be at least 16, got {getattr(self, name)}")
        if self.threshold < 0:
            raise ValueError(f"data.threshold: must not be negative, got {self.threshold}")
        if not 0 < self.train_share < 1:
            raise ValueError(f"data.train_share: must be in (0, 1), got {self.train_share}")
        if self.split_seed < 0:
            raise ValueError(f"data.split_seed: must not be negative, got {self.split_seed}")
        if not (self.train_files and self.test_files):
            raise ValueError("data.train_files, data.test_files: name at least one file each")
        if (self.links == "spotlight") != bool(self.spotlight_url):
            raise ValueError("data.spotlight_url: is needed with links: spotlight, and only then")


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
