"""Explicit Sparse Transformer (Zhao et al. 2019, arXiv:1912.11637).

Attention over the k highest-scoring keys of each query. The names below are imported when they are
first used, so that ``--help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from separata_shared.attention import topk_attention

    from .build import build_model
    from .config import AttentionConfig, DecodeConfig, ModelConfig
    from .convert import make_sparse, measure_attention
    from .generate import load_run, translate_lines
    from .model import ExplicitSparseTransformer, TopKAttention
    from .multihead import TopKMultiheadAttention

__all__ = [
    "AttentionConfig",
    "DecodeConfig",
    "ExplicitSparseTransformer",
    "ModelConfig",
    "TopKAttention",
    "TopKMultiheadAttention",
    "build_model",
    "load_run",
    "make_sparse",
    "measure_attention",
    "topk_attention",
    "translate_lines",
]

_MODULES = {
    "AttentionConfig": ".config",
    "DecodeConfig": ".config",
    "ExplicitSparseTransformer": ".model",
    "ModelConfig": ".config",
    "TopKAttention": ".model",
    "TopKMultiheadAttention": ".multihead",
    "build_model": ".build",
    "load_run": ".generate",
    "make_sparse": ".convert",
    "measure_attention": ".convert",
    "topk_attention": "separata_shared.attention",
    "translate_lines": ".generate",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("separata-explicit-sparse-transformer")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
