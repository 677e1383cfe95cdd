"""Reading trained models, and the verbs ``translate`` and ``score``."""

from functools import partial

from separata_shared import translation

from .config import ModelConfig
from .build import build_demonstrator, build_learner, build_mask_predictor, build_teacher

load_teacher = partial(translation.load_run, ModelConfig, build_teacher)
"""Read a trained teacher: ``load_teacher(run, weights=...)``."""

load_demonstrator = partial(translation.load_run, ModelConfig, build_demonstrator)
"""Read a trained demonstrator: ``load_demonstrator(run, weights=...)``."""

load_learner = partial(translation.load_run, ModelConfig, build_learner)
"""Read a trained learner: ``load_learner(run, weights=...)``."""

load_mask_predictor = partial(translation.load_run, ModelConfig, build_mask_predictor)
"""Read a trained mask-predict model: ``load_mask_predictor(run, weights=...)``."""
