"""Imitation learning for non-autoregressive translation (Wei et al. 2019, arXiv:1906.02041).

A reconstruction: no code of the authors exists. The names below are imported when they are first
used, so that ``--help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import (
        build_demonstrator,
        build_learner,
        build_mask_predictor,
        build_teacher,
        initialise,
    )
    from .cmlm import mask_predict
    from .config import DataConfig, DecodeConfig, ModelConfig, ParallelDecodeConfig
    from .decode import parallel_decode, teacher_scores
    from .losses import BalanceRegulariser, imitation_loss
    from .model import Demonstrator, Learner, MaskPredictor

__all__ = [
    "BalanceRegulariser",
    "DataConfig",
    "DecodeConfig",
    "Demonstrator",
    "Learner",
    "MaskPredictor",
    "ModelConfig",
    "ParallelDecodeConfig",
    "build_demonstrator",
    "build_learner",
    "build_mask_predictor",
    "build_teacher",
    "imitation_loss",
    "initialise",
    "mask_predict",
    "parallel_decode",
    "teacher_scores",
]

_MODULES = {
    "BalanceRegulariser": ".losses",
    "DataConfig": ".config",
    "DecodeConfig": ".config",
    "Demonstrator": ".model",
    "Learner": ".model",
    "MaskPredictor": ".model",
    "ModelConfig": ".config",
    "ParallelDecodeConfig": ".config",
    "build_demonstrator": ".build",
    "build_learner": ".build",
    "build_mask_predictor": ".build",
    "build_teacher": ".build",
    "imitation_loss": ".losses",
    "initialise": ".build",
    "mask_predict": ".cmlm",
    "parallel_decode": ".decode",
    "teacher_scores": ".decode",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("separata-imitation-nat")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
