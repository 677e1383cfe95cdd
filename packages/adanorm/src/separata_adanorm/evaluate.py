"""Scores of a trained translation model: the verb ``evaluate``."""

from functools import partial

from separata_shared import translation

from .generate import load_run

evaluate = partial(translation.evaluate, load_run)
"""Translate a split and score it."""
