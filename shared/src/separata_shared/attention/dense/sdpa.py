"""Adapter to ``torch.nn.functional.scaled_dot_product_attention``."""

import torch
from torch import Tensor
from torch.nn import functional as F

from separata_shared.attention._inputs import allowed_keys


def supports(*, return_weights: bool) -> str | None:
    """Give the reason why the call cannot be served, None where it can."""
    return "it does not return weights" if return_weights else None


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
    """Dense attention by torch's fused kernels; arguments as in ``dense_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    target, source = query.shape[2], key.shape[2]
    # torch aligns its causal flag to the top left; the two agree for square scores only.
    is_causal = causal and target == source and mask is None and bias is None
    allowed = None
    if not is_causal:
        allowed = allowed_keys(
            mask, causal=causal, target=target, source=source, device=query.device
        )
    attn_mask = allowed
    if bias is not None:
        attn_mask = bias.to(query.dtype)
        if allowed is not None:
            attn_mask = torch.where(allowed, attn_mask, -torch.inf)
    output = F.scaled_dot_product_attention(
        query,
        key.to(query.dtype),
        value.to(query.dtype),
        attn_mask=attn_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(value.dtype)
    if attn_mask is None:
        return output
    empty = ~allowed if bias is None and allowed is not None else attn_mask == -torch.inf
    return output.masked_fill(empty.all(dim=-1, keepdim=True), 0.0)
