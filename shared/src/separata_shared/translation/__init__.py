"""Translation recipes: corpora, the Transformer on them, training, search and scores.

A package brings its model: a dataclass of settings that extends ``TransformerConfig`` and a
function from those settings to a ``Transformer``.
"""

from separata_shared.translation.config import DataConfig, DecodeConfig, TransformerConfig
from separata_shared.translation.data import Corpus, ParallelBatch, Split, load, load_characters
from separata_shared.translation.fairseq import from_fairseq
from separata_shared.translation.model import build_transformer
from separata_shared.translation.preparation import prepare
from separata_shared.translation.scoring import evaluate
from separata_shared.translation.search import (
    TrainedModel,
    generate,
    load_run,
    translate,
    translate_lines,
)
from separata_shared.translation.train import (
    fit_translation,
    load_for,
    translation_step,
    validation_loss,
)

__all__ = [
    "Corpus",
    "DataConfig",
    "DecodeConfig",
    "ParallelBatch",
    "Split",
    "TrainedModel",
    "TransformerConfig",
    "build_transformer",
    "evaluate",
    "fit_translation",
    "from_fairseq",
    "generate",
    "load",
    "load_characters",
    "load_for",
    "load_run",
    "prepare",
    "translate",
    "translate_lines",
    "translation_step",
    "validation_loss",
]
