"""Top-k attention for short sequences: whole score matrices, few passes over them.

The thresholds of all rows come from one sorting network, vectorised over the rows, instead of a
selection inside each row. Scores and weights have the precision of the contract; the products with
values and in the backward run in the inputs' own dtype, as in torch's fused kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from separata_shared.attention._inputs import allowed_keys, compute_dtype
from separata_shared.attention.topk.kth_largest import kth_largest


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
    """Top-k attention at once; arguments as in ``topk_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``, and weights ``(B, H, T, S)`` before
        dropout in float32 (float64 for float64 inputs).
    """
    allowed = allowed_keys(
        mask, causal=causal, target=query.shape[2], source=key.shape[2], device=query.device
    )
    output, weights = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, top_k, allowed, bias, ties, dropout
    )
    return output, weights


class _Attention(torch.autograd.Function):
    """Autograd would keep and pass over each step's matrix; the backward needs the weights only."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        top_k: int | Tensor,
        allowed: Tensor | None,
        bias: Tensor | None,
        ties: str,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(query, key, value)
        q = _share_heads(query.to(dtype), key)
        scores = _product(q, key.to(dtype).mT, query.shape[3] ** -0.5)
        scores = scores.view(*query.shape[:3], key.shape[2])
        if bias is not None:
            scores += bias
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        weights = _keep(scores, top_k, ties).softmax(dim=-1)
        empty = None if allowed is None else ~allowed.any(dim=-1, keepdim=True)
        if bias is not None:  # which may itself be -inf
            empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
        if empty is not None:
            weights.masked_fill_(empty, 0.0)

        low = weights.to(value.dtype)
        factor = None
        used = low
        if dropout > 0.0:
            factor = torch.empty_like(low).bernoulli_(1.0 - dropout).div_(1.0 - dropout)
            used = low * factor
        output = (_share_heads(used, key) @ value).view(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, low, factor, bias)
        ctx.set_materialize_grads(False)
        return output, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_weights: Tensor | None) -> tuple[Any, ...]:
        query, key, value, weights, factor, bias = ctx.saved_tensors
        dtype = value.dtype
        if grad is None:
            grad = value.new_zeros(*query.shape[:3], value.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            grad = _share_heads(grad.to(dtype), key)
            used = weights if factor is None else weights * factor
            grad_value = _share_heads(used, key).mT @ grad
            grad_kept = (grad @ value.mT).view_as(weights)
            if factor is not None:
                grad_kept *= factor
            if grad_weights is not None:
                grad_kept = grad_kept + grad_weights.to(dtype)
            # dP = A (dA - sum over the row of A dA): zero wherever A is
            grad_scores = torch.ops.aten._softmax_backward_data(grad_kept, weights, -1, dtype)
            shared = _share_heads(grad_scores, key)
            scale = query.shape[3] ** -0.5
            grad_query = _product(shared, key.to(dtype), scale).view(query.shape)
            grad_key = _product(shared.mT, _share_heads(query.to(dtype), key), scale)
        grad_bias = None
        if ctx.needs_input_grad[5]:
            grad_bias = grad_scores.sum_to_size(bias.shape).to(bias.dtype)
        return (
            grad_query.to(query.dtype),
            grad_key.to(key.dtype),
            grad_value,
            None,
            None,
            grad_bias,
            None,
            None,
        )


def _share_heads(x: Tensor, key: Tensor) -> Tensor:
    """Lay query heads that share a key head after one another: ``(B, H_kv, H / H_kv T, ...)``."""
    return x if x.shape[1] == key.shape[1] else x.reshape(*key.shape[:2], -1, x.shape[3])


def _product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """``scale * first @ second`` of ``(B, H, ...)`` without a pass for the scale."""
    output = first.new_empty(*first.shape[:3], second.shape[3])
    output.flatten(0, 1).baddbmm_(first.flatten(0, 1), second.flatten(0, 1), beta=0, alpha=scale)
    return output


def _keep(scores: Tensor, top_k: int | Tensor, ties: str) -> Tensor:
    """Lower the scores ``(B, H, T, S)`` that are not selected so far that their weight is 0."""
    k = top_k if isinstance(top_k, int) else top_k.to(scores.device).unsqueeze(-1)
    threshold = kth_largest(scores, k)
    # Comparing into floats and subtracting the largest one is ten times faster than masking.
    removed = torch.lt(scores, threshold, out=torch.empty_like(scores))
    if ties == "exact":
        equal = scores == threshold
        places = k - (scores > threshold).sum(dim=-1, keepdim=True)
        removed += equal & (equal.cumsum(-1) > places)
    return scores.sub_(removed, alpha=torch.finfo(scores.dtype).max)
