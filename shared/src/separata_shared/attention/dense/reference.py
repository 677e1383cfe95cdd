"""The specification of dense attention: eager, any float dtype, differentiable by autograd."""

import torch
from torch import Tensor

from separata_shared.attention._inputs import allowed_keys, compute_dtype, repeat_heads


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Dense attention step by step; arguments as in ``dense_attention``.

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

    # 2. Masked keys get -inf; a row without any allowed key gets 0 and ends as zeros.
    allowed = allowed_keys(
        mask, causal=causal, target=target, source=k.shape[2], device=query.device
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    empty = None
    if allowed is not None or bias is not None:
        empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)

    # 3. A = softmax(P).
    weights = scores.softmax(dim=-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)

    # 4. C = dropout(A) v.
    output = torch.dropout(weights, dropout, train=dropout > 0.0) @ v
    return output.to(value.dtype), weights
