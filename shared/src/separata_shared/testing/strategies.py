"""Hypothesis strategies for the inputs of attention operations.

Shapes: query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    top_k: int
    mask: Tensor | None
    bias: Tensor | None
    causal: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, the positional arguments."""
        return self.query, self.key, self.value

    @property
    def options(self) -> dict[str, Any]:
        """The named arguments that dense and top-k attention share."""
        return {"mask": self.mask, "bias": self.bias, "causal": self.causal}

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """The same numbers in another floating type."""
        return replace(
            self,
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
        )

    def leaves(self) -> "AttentionInputs":
        """Query, key and value as new leaves that take gradients, in the same memory layout."""
        query, key, value = (
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x).requires_grad_()
            for x in self.tensors
        )
        return replace(self, query=query, key=key, value=value)

    def allowed(self) -> Tensor:
        """Which keys each query may attend, (B, H, T, S)."""
        batch, heads, target, _ = self.query.shape
        source = self.key.shape[2]
        allowed = torch.ones(batch, heads, target, source, dtype=torch.bool)
        if self.mask is not None:
            allowed = allowed & self.mask
        if self.causal:
            allowed = allowed.tril(source - target)
        return allowed

    def scores(self) -> Tensor:
        """Masked scores in float64, (B, H, T, S)."""
        heads, width = self.query.shape[1], self.query.shape[3]
        key = self.key.double().repeat_interleave(heads // self.key.shape[1], dim=1)
        scores: Tensor = self.query.double() @ key.mT * width**-0.5
        if self.bias is not None:
            scores = scores + self.bias.double()
        return scores.masked_fill(~self.allowed(), -torch.inf)

    def gap(self) -> float:
        """Smallest distance between a row's k-th and (k+1)-th score; inf if nothing is removed."""
        ordered = self.scores().sort(dim=-1, descending=True).values
        if self.top_k >= ordered.shape[-1]:
            return float("inf")
        kept, removed = ordered[..., self.top_k - 1], ordered[..., self.top_k]
        return float(torch.where(removed.isinf(), torch.inf, kept - removed).min())


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _time_first(x: Tensor) -> Tensor:
    """As a projection split into heads leaves it: (B, T, H, D) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _interleaved(x: Tensor) -> Tensor:
    """Every other number of a larger tensor."""
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (_contiguous, _time_first, _interleaved)


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    *,
    max_length: int = 13,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    gap: float = 0.0,
) -> AttentionInputs:
    """Small attention problems: odd and single lengths, grouped heads, masks, biases, strides.

    k goes beyond the number of keys; masks and causality can leave a query without any key.

    Args:
        draw: Given by Hypothesis.
        max_length: Longest T and S.
        dtypes: Floating types of query, key, value and bias.
        gap: Smallest distance between the k-th and the (k+1)-th score of every row. Selection jumps
            there, so two implementations can only be compared where it is clear.
    """
    batch, kv_heads, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    target, source = draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    width, value_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    heads = kv_heads * group
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(list(dtypes)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    shapes = ((heads, target, width), (kv_heads, source, width), (kv_heads, source, value_width))
    query, key, value = (draw(st.sampled_from(LAYOUTS))(normal(batch, *shape)) for shape in shapes)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        top_k=draw(st.integers(1, source + 2)),
        mask=draw(masks(batch, heads, target, source, random)),
        bias=normal(*draw(st.sampled_from([(target, source), (heads, target, source)])))
        if draw(st.booleans())
        else None,
        causal=draw(st.booleans()),
    )
    assume(inputs.gap() > gap)
    return inputs


@st.composite
def masks(
    draw: st.DrawFn, batch: int, heads: int, target: int, source: int, random: torch.Generator
) -> Tensor | None:
    """No mask, padded keys, one mask for all, or one for each head; rows may be empty.

    Args:
        draw: Given by Hypothesis.
        batch: B.
        heads: H.
        target: T.
        source: S.
        random: Decides the entries.
    """
    kind = draw(st.sampled_from(["none", "padding", "common", "full"]))
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.randint(0, source + 1, (batch, 1, 1, 1), generator=random)
        return torch.arange(source) < lengths
    shape = (target, source) if kind == "common" else (batch, heads, target, source)
    share = draw(st.sampled_from([0.2, 0.5, 0.9]))
    return torch.rand(shape, generator=random) < share
