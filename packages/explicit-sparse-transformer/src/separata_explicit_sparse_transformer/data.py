"""The corpora of this paper: sentence pairs for translation, characters for the language model.

Reading, preparing and batching them is the same for every paper that translates.
"""

from separata_shared.data.characters import Characters
from separata_shared.translation import (
    Corpus,
    DataConfig,
    ParallelBatch,
    Split,
    load,
    load_characters,
    prepare,
)

__all__ = [
    "Characters",
    "Corpus",
    "DataConfig",
    "ParallelBatch",
    "Split",
    "load",
    "load_characters",
    "prepare",
]
