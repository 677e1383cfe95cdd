"""Batches, padding and vocabularies."""

from separata_shared.data.batching import Batches, BatchStream, MappedSequence, TokenBuckets
from separata_shared.data.collate import pad, to_device

__all__ = ["BatchStream", "Batches", "MappedSequence", "TokenBuckets", "pad", "to_device"]
