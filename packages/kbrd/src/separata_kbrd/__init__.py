"""KBRD, a knowledge-based recommender dialog system (Chen et al. 2019, arXiv:1908.05391).

The names below are imported when they are first used, so that ``--help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig, DialogConfig, RecommenderConfig
    from .conversation import Conversation
    from .dialog import DialogModel
    from .system import System, load_system

__all__ = [
    "Conversation",
    "DataConfig",
    "DialogConfig",
    "DialogModel",
    "RecommenderConfig",
    "System",
    "load_system",
]

_MODULES = {
    "Conversation": ".conversation",
    "DataConfig": ".config",
    "DialogConfig": ".config",
    "DialogModel": ".dialog",
    "RecommenderConfig": ".config",
    "System": ".system",
    "load_system": ".system",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("separata-kbrd")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
