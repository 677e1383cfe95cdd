"""Softmax attention with mask and bias."""

from separata_shared.attention.dense.api import dense_attention

__all__ = ["dense_attention"]
