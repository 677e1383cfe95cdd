"""Dense attention in whole matrices of the inputs' dtype: the fastest for short ones on a CPU."""

import torch
from torch import Tensor

from separata_shared.attention._inputs import allowed_keys, repeat_heads


def supports(*, return_weights: bool) -> str | None:
    """Give the reason why the call cannot be served, None where it can."""
    return "its weights have the precision of the inputs" if return_weights else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Dense attention at once; arguments as in ``dense_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    dtype = value.dtype
    num_heads, target, width = query.shape[1:]
    q = query.to(dtype) * width**-0.5
    k = repeat_heads(key.to(dtype), num_heads)
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias.to(dtype)
    allowed = allowed_keys(
        mask, causal=causal, target=target, source=key.shape[2], device=query.device
    )
    empty = None
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
        empty = ~allowed.any(dim=-1, keepdim=True)
    if bias is not None:  # which may itself be -inf
        empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    # The softmax sums in float32 for half-precision scores. A row of -inf would give NaN, also in
    # the gradient, so it takes part with zeros and is removed afterwards.
    if empty is not None:
        scores = scores.masked_fill(empty, 0.0)
    weights = scores.softmax(dim=-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    weights = torch.dropout(weights, dropout, train=dropout > 0.0)
    return weights @ repeat_heads(value, num_heads)
