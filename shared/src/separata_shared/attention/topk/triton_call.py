"""What the Triton kernels of one call have in common: block sizes, tensors as they take them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Numbers that one program gathers at a time: 16 for each of its 128 threads.
GATHERED = 2048


@dataclass(frozen=True)
class Sizes:
    """Sizes of blocks and lists; those of scores are the same in every kernel of a call."""

    M: int  # query rows of a block of scores
    N: int  # its keys, and the number of groups
    depth: int  # largest scores kept of each group
    capacity: int  # candidates of a row
    slots: int  # kept keys of a row
    num_warps: int
    num_stages: int


def choose_sizes(query: Tensor, value: Tensor, *, most: int, ties: str) -> Sizes:
    """Choose the sizes such that registers suffice; estimates, not measured.

    A row is expected to have up to 1.2 k candidates. A list has room for some keys beyond k, which
    equal scores add.
    """
    single, width = query.dtype == torch.float32, max(query.shape[3], value.shape[3])
    groups = 64 if most <= 128 else 128
    return Sizes(
        M=min(16 if single else 64, block_of(query.shape[2])),
        N=groups,
        depth=min(power_of_two(cdiv(4 * most, groups)), 4),
        capacity=max(2 * power_of_two(most), 32),
        slots=most if ties == "exact" else most // 4 * 4 + 8,
        num_warps=8 if single or width > 128 else 4,
        num_stages=3 if width <= 64 else 2,
    )


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def block_of(size: int) -> int:
    """The size of a block that holds ``size``; products of matrices take at least 16."""
    return max(power_of_two(size), 16)


def cdiv(number: int, size: int) -> int:
    """How many blocks of ``size`` hold ``number``."""
    return -(-number // size)


class Call:
    """What the kernels of a forward or backward have in common.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        value: ``(B, H_kv, S, D_v)``.
        top_k: Broadcastable to ``(B, H, T)``; None where ``most`` is k of every row.
        most: Largest k.
        mask: Boolean, of four dimensions.
        bias: Of four dimensions.
        ties: ``"keep"`` or ``"exact"``.
        seed: Seed of dropout, ``(1,)``, empty without.
        dropout: Probability of dropping a weight.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        top_k: Tensor | None,
        most: int,
        mask: Tensor | None,
        bias: Tensor | None,
        ties: str,
        seed: Tensor,
        dropout: float,
    ) -> None:
        self.kernels = kernels = load_kernels()
        self.sizes = choose_sizes(query, value, most=most, ties=ties)
        batch, num_heads, target, width = query.shape
        source = key.shape[2]
        self.scores = (batch, num_heads, target, source)
        k = most if top_k is None else top_k
        dtype = torch.promote_types(query.dtype, key.dtype)
        self.problem = kernels.Problem(
            query=self.strided(query.to(dtype)),
            key=self.strided(key.to(dtype)),
            value=self.strided(value),
            mask=self.broadcast(mask),
            bias=self.broadcast(bias),
            top_k=kernels.Strided(
                k, k.expand(self.scores[:3]).stride() if isinstance(k, Tensor) else None
            ),
            H=num_heads,
            repeats=num_heads // key.shape[1],
            T=target,
            S=source,
            scale=width**-0.5,
        )
        self.dropout = kernels.Dropout(seed if dropout > 0.0 else None, dropout)
        self.rows = batch * num_heads * target
        self.query_width = {"D": width, "BLOCK_D": block_of(width)}
        self.value_width = {"D_V": value.shape[3], "BLOCK_V": block_of(value.shape[3])}
        self.widths = {**self.query_width, **self.value_width}
        self.tile = {"M": self.sizes.M, "N": self.sizes.N, "num_warps": self.sizes.num_warps}
        # One program for each tile of query rows or of keys.
        self.query_tiles = (batch * num_heads * cdiv(target, self.sizes.M),)
        self.key_tiles = (batch * key.shape[1] * cdiv(source, self.sizes.N),)

    def strided(self, x: Tensor) -> Any:
        """A tensor as the kernels take it."""
        return self.kernels.Strided(x, x.stride())

    def broadcast(self, x: Tensor | None) -> Any:
        """A mask or bias; kernels read one row where all rows are equal."""
        if x is None:
            return self.kernels.Strided(None, None)
        strides = x.expand(self.scores).stride()
        rows = None if x.shape[2] == 1 else strides[2]
        return self.kernels.Strided(x, (strides[0], strides[1], rows, strides[3]))

    def gathering(self, most: int) -> dict[str, int]:
        """How many rows a program takes where keys are gathered, and how many keys at a time."""
        rows = max(1, min(8, 512 // power_of_two(most)))
        widest = max(self.widths["BLOCK_D"], self.widths["BLOCK_V"])
        keys = max(1, min(GATHERED // (rows * widest), power_of_two(most)))
        return {"BLOCK_R": rows, "C": keys}


def load_kernels() -> ModuleType:
    """Import the kernels; PyTorch for CPUs comes without Triton."""
    from separata_shared.attention.topk import triton_kernels

    return triton_kernels
