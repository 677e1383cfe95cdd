"""Sums over the processes of a run."""

import torch.distributed as dist
from torch import Tensor


def add_up(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, in place; with one process it stays as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
