"""Softmax attention over the k largest scores of each query."""

from separata_shared.attention.topk.api import topk_attention

__all__ = ["topk_attention"]
