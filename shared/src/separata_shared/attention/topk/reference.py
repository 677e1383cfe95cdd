"""The specification of top-k attention: eager, any float dtype, differentiable by autograd."""

import torch
from torch import Tensor

from separata_shared.attention._inputs import allowed_keys, compute_dtype, repeat_heads


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: int | Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    ties: str,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Top-k attention step by step; arguments as in ``topk_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``, and weights ``(B, H, T, S)`` before
        dropout in float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype(query, key, value)
    num_heads, target, width = query.shape[1:]
    q = query.to(dtype) * width**-0.5
    k = repeat_heads(key.to(dtype), num_heads)
    v = repeat_heads(value.to(dtype), num_heads)

    # 1. Scores P = q k^T / sqrt(D) + bias.
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias.to(dtype)

    # 2. Masking comes before the selection: a masked key never takes one of the k places.
    allowed = allowed_keys(
        mask, causal=causal, target=target, source=k.shape[2], device=query.device
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)

    # 3. and 4. Keep the scores from the k-th largest, t_i, upwards; t_i is a constant of the
    # backward pass.
    keep = select(scores.detach(), top_k, ties=ties)
    # 5. A = softmax over the kept scores; rows without any stay zero.
    empty = ~keep.any(dim=-1, keepdim=True)
    kept = scores.masked_fill(~keep & ~empty, -torch.inf).masked_fill(empty, 0.0)
    weights = kept.softmax(dim=-1).masked_fill(empty, 0.0)
    # A score that is no number is in no order, so it shows in all of its row.
    weights = weights.masked_fill(scores.isnan().any(dim=-1, keepdim=True), torch.nan)

    # 6. Dropout on A, 7. C = A v.
    output = torch.dropout(weights, dropout, train=dropout > 0.0) @ v
    return output.to(value.dtype), weights


def select(scores: Tensor, top_k: int | Tensor, *, ties: str) -> Tensor:
    """Say which scores stay, ``(..., T, S)`` boolean; those of ``-inf`` never do."""
    source = scores.shape[-1]
    k = torch.as_tensor(top_k, device=scores.device).unsqueeze(-1)
    k = k.clamp(max=source).expand(*scores.shape[:-1], 1)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    if ties == "keep":
        keep = scores >= ordered.gather(-1, k - 1)
    else:  # the stable order puts the lowest key index first among equals
        first = torch.arange(source, device=scores.device) < k
        keep = torch.zeros_like(first).scatter(-1, order, first)
    return keep & (scores > -torch.inf)
