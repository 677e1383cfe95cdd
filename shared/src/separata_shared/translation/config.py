"""Settings that every translation recipe has: the corpus, the Transformer, the search."""

import math
from dataclasses import dataclass
from typing import Literal

Dataset = Literal[
    "tiny",
    "sample",
    "text",
    "multi30k",
    "iwslt14_de_en",
    "iwslt15_en_vi",
    "tiny_characters",
    "enwik8",
]
CHARACTERS = ("tiny_characters", "enwik8")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which corpus, how it becomes tokens, and how tokens become batches."""

    dataset: Dataset = "tiny"
    """``tiny``: made sentence pairs. ``sample``: Middle English to modern English, out of two pip
    packages. ``text``: your own files. ``multi30k``, ``iwslt14_de_en``, ``iwslt15_en_vi``: the
    public sets. ``tiny_characters`` (made) and ``enwik8``: characters for the language model."""

    raw: str = "data/raw"
    """Directory of the downloaded files. With ``text``: a directory with ``train``, ``valid`` and
    ``test`` as ``.tsv`` or as one file per language (``train.de``, ``train.en``), or one ``.tsv``
    file, which is then split by a hash of its source lines. ``.gz`` and ``.xz`` are read too."""

    prepared: str = "data/prepared"
    """Directory that ``prepare`` writes and the other commands read."""

    source_language: str = "de"
    """Ending of the source files' names."""

    target_language: str = "en"
    """Ending of the target files' names."""

    lowercase: bool = False
    """Whether ``prepare`` lower-cases the text; IWSLT'14 De-En always is."""

    segmentation: Literal["bpe", "unigram", "words"] = "bpe"
    """Sub-words by byte-pair encoding or by a unigram model (sentencepiece), or whole words."""

    vocabulary_size: int = 10000
    """Tokens of each vocabulary, four special ones included (words: at most so many)."""

    vocabularies: Literal["joint", "separate"] = "joint"
    """One vocabulary learned on both sides, or one for each side."""

    max_length: int = 256
    """Longest sentence in tokens, end mark included. Longer training pairs are left out and
    counted; a longer validation or test sentence is an error."""

    max_tokens: int = 4000
    """Padded tokens of a batch, on the longer side."""

    train_bytes: int = 0
    """With ``enwik8``: use only so many bytes of the training part; 0 means all."""

    tiny_task: Literal["copy", "reverse", "map"] = "reverse"
    """What the target of a ``tiny`` pair is: the source, the source backwards, or the source with
    every symbol replaced by its partner in another alphabet."""

    tiny_pairs: int = 2000
    """Training pairs (or characters / 10) of the made data; a tenth for each other split."""

    tiny_symbols: int = 12
    """Symbols of the made data."""

    tiny_length: int = 10
    """Longest made sentence in symbols; the shortest has three."""

    @property
    def lowercased(self) -> bool:
        """Whether the text of this data is in lower case."""
        return self.lowercase or self.dataset == "iwslt14_de_en"

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("max_length", "max_tokens", "tiny_pairs", "tiny_symbols"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: must be at least 1, got {getattr(self, name)}")
        if self.vocabulary_size < 5:
            raise ValueError(f"data.vocabulary_size: at least 5, got {self.vocabulary_size}")
        if self.max_tokens < self.max_length:
            raise ValueError(
                f"data.max_tokens: {self.max_tokens} cannot hold one sentence of data.max_length "
                f"{self.max_length}"
            )
        if self.tiny_length < 3:
            raise ValueError(f"data.tiny_length: must be at least 3, got {self.tiny_length}")
        if self.train_bytes < 0:
            raise ValueError(f"data.train_bytes: must not be negative, got {self.train_bytes}")
        if self.source_language == self.target_language:
            raise ValueError(
                f"data.source_language, data.target_language: both are {self.source_language!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and wiring of the encoder-decoder."""

    width: int = 512
    """Model width M."""

    num_heads: int = 8
    """Attention heads H."""

    hidden_width: int = 2048
    """Inner width of the feed-forward layers."""

    encoder_layers: int = 6
    """Number of encoder layers."""

    decoder_layers: int = 6
    """Number of decoder layers."""

    dropout: float = 0.1
    """Dropout after each sub-layer and on the embeddings."""

    attention_dropout: float = 0.0
    """Dropout on the attention weights."""

    activation_dropout: float = 0.0
    """Dropout after the feed-forward activation."""

    normalisation: Literal["post", "pre"] = "post"
    """Layer normalisation after the residual sum, or before the sub-layer."""

    embeddings: Literal["joint", "target", "separate"] = "joint"
    """Tables shared by source, target and output (``joint``), by target and output only
    (``target``), or by none (``separate``)."""

    max_length: int = 1024
    """Longest sequence in tokens, end mark included."""

    source_vocabulary_size: int = 0
    """Source types V; 0 takes the number from the prepared data."""

    target_vocabulary_size: int = 0
    """Target types V; 0 takes the number from the prepared data."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        layers = ("encoder_layers", "decoder_layers")
        for name in ("width", "num_heads", "hidden_width", *layers):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"model.max_length: must be at least 2, got {self.max_length}")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.num_heads: {self.num_heads} heads do not divide width {self.width}"
            )
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}: must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Beam search and the protocol that scores its output."""

    beam: int = 5
    """Hypotheses kept per sentence."""

    length_penalty: Literal["power", "gnmt"] = "power"
    """``power`` divides by length^alpha (fairseq), ``gnmt`` by ((5+length)/6)^alpha (t2t)."""

    alpha: float = 1.0
    """Exponent of the length penalty."""

    max_length_factor: float = 1.0
    """Longest output = factor * source length + constant."""

    max_length_constant: int = 50
    """Longest output = factor * source length + constant."""

    max_tokens: int = 4000
    """Padded source tokens of one batch times beam."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for name in ("beam", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"decode.{name}: must be at least 1, got {getattr(self, name)}")
        for name, least in (("max_length_factor", 0), ("max_length_constant", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"decode.{name}: must be at least {least}, got {getattr(self, name)}"
                )
        if not math.isfinite(self.alpha):
            raise ValueError(f"decode.alpha: must be a number, got {self.alpha}")
