"""Norms of "Understanding and Improving Layer Normalization" (Xu et al. 2019, arXiv:1911.07013).

AdaNorm and its relatives. The names below are imported when they are first used, so that ``--help``
needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import norm_factory
    from .monitor import monitor_outliers
    from .norms import (
        AdaNorm,
        ClippedLayerNorm,
        DetachNorm,
        GradNorm,
        LayerNormSimple,
        NoNorm,
        ada_norm,
        add_ada_norm,
        add_layer_norm_simple,
        clipped_layer_norm,
        detach_norm,
        grad_norm,
        layer_norm_simple,
    )
    from .replace import load_layer_norm_checkpoint, replace_norms
    from .statistics import gradient_statistics

__all__ = [
    "AdaNorm",
    "ClippedLayerNorm",
    "DetachNorm",
    "GradNorm",
    "LayerNormSimple",
    "NoNorm",
    "ada_norm",
    "add_ada_norm",
    "add_layer_norm_simple",
    "clipped_layer_norm",
    "detach_norm",
    "grad_norm",
    "gradient_statistics",
    "layer_norm_simple",
    "load_layer_norm_checkpoint",
    "monitor_outliers",
    "norm_factory",
    "replace_norms",
]

_MODULES = {
    "AdaNorm": ".norms",
    "ClippedLayerNorm": ".norms",
    "DetachNorm": ".norms",
    "GradNorm": ".norms",
    "LayerNormSimple": ".norms",
    "NoNorm": ".norms",
    "ada_norm": ".norms",
    "add_ada_norm": ".norms",
    "add_layer_norm_simple": ".norms",
    "clipped_layer_norm": ".norms",
    "detach_norm": ".norms",
    "grad_norm": ".norms",
    "gradient_statistics": ".statistics",
    "layer_norm_simple": ".norms",
    "load_layer_norm_checkpoint": ".replace",
    "monitor_outliers": ".monitor",
    "norm_factory": ".build",
    "replace_norms": ".replace",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("separata-adanorm")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
