"""Translation with a trained model: the verb ``generate``."""

from functools import partial

from separata_shared import translation
from separata_shared.translation import translate, translate_lines

from .build import build_model
from .config import ModelConfig

__all__ = ["TrainedModel", "generate", "load_run", "translate", "translate_lines"]

TrainedModel = translation.TrainedModel[ModelConfig]

load_run = partial(translation.load_run, ModelConfig, build_model)
"""Read a trained model: ``load_run(run, weights=..., model=...)``."""

generate = partial(translation.generate, load_run)
"""Translate text, one sentence per line."""
