"""Translation with a trained model: the verb ``generate``."""

from functools import partial

from separata_shared import translation

from .config import ModelConfig
from .model import build_model

load_run = partial(translation.load_run, ModelConfig, build_model)
"""Read a trained model: ``load_run(run, weights=..., model=...)``."""

generate = partial(translation.generate, load_run)
"""Translate text, one sentence per line."""
