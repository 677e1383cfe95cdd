"""Putting sequences of different lengths into one tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def pad(sequences: Sequence[ArrayLike], padding_index: int, *, length: int | None = None) -> Tensor:
    """Rows of token numbers, padded on the right.

    Args:
        sequences: B sequences of integers.
        padding_index: Number that fills the rest.
        length: Width of the result; the longest sequence by default.

    Returns:
        Tokens, int64, shape (B, T); (0, 0) for no sequences.

    Raises:
        ValueError: A sequence is longer than ``length``.
    """
    rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"sequence {int(lengths.argmax())} has {longest} tokens, limit {width}")
    padded = np.full((len(rows), width), padding_index, dtype=np.int64)
    if rows:
        padded[np.arange(width) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(padded)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move a batch: anything with a method ``to``, or tuples, lists and dicts of such things."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, dict):
        return {key: to_device(item, device) for key, item in batch.items()}
    return batch
