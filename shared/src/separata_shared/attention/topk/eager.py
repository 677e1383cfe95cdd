"""Top-k attention for short sequences: whole score matrices, few passes over them.

The thresholds of all rows come from one sorting network, vectorised over the rows, instead of a
selection inside each row. Scores and weights have the precision of the contract; the products with
values and in the backward run in the inputs' own dtype, as in torch's fused kernels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from separata_shared.attention._inputs import allowed_keys, compute_dtype

# Beyond this number of keys the network has more comparisons than ``topk`` costs.
NETWORK_KEYS = 32
# Nor do fewer rows pay for the calls.
NETWORK_ROWS = 256
# Scores that pass through the network at a time: they stay in the cache of a core.
NETWORK_SCORES = 2**19


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
        q = _share_heads(query.to(dtype) * query.shape[3] ** -0.5, key)
        scores = (q @ key.to(dtype).mT).view(*query.shape[:3], key.shape[2])
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
            grad_query = (shared @ key.to(dtype)).view(query.shape).mul_(scale)
            grad_key = (shared.mT @ _share_heads(query.to(dtype), key)).mul_(scale)
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


def _keep(scores: Tensor, top_k: int | Tensor, ties: str) -> Tensor:
    """Put ``-inf`` in place of the scores ``(B, H, T, S)`` that are not selected."""
    source = scores.shape[3]
    if isinstance(top_k, int):
        k: int | Tensor = min(top_k, source)
        threshold = _descending(scores, min(top_k, source))[-1].unsqueeze(-1)
    else:
        k = top_k.to(scores.device).clamp(max=source).unsqueeze(-1)
        k = k.expand(*scores.shape[:3], 1)
        # A compiled graph cannot depend on the largest k.
        most = source if torch.compiler.is_compiling() else int(k.amax()) if k.numel() else 1
        ordered = torch.stack(_descending(scores, most), dim=-1)
        threshold = ordered.gather(-1, k - 1)
    removed = scores < threshold
    if ties == "exact":
        equal = scores == threshold
        places = k - (scores > threshold).sum(dim=-1, keepdim=True)
        removed |= equal & (equal.cumsum(-1) > places)
    return scores.masked_fill_(removed, -torch.inf)


def _descending(scores: Tensor, count: int) -> list[Tensor]:
    """The largest ``count`` scores of each row, in descending order, as ``count`` tensors.

    A row is dealt into lists as long as the next power of two. Each comparison of the networks
    below works on one place of all lists of all rows, so the work is vectorised however short the
    rows are, where ``topk`` costs microseconds for each row.
    """
    if count > NETWORK_KEYS or scores[..., 0].numel() < NETWORK_ROWS:
        return list(scores.topk(count, dim=-1).values.unbind(-1))
    source = scores.shape[-1]
    length = 1 << (count - 1).bit_length()
    num_lists = 1 << (-(-source // length) - 1).bit_length()
    parts = []
    for rows in torch.split(scores.reshape(-1, source), max(NETWORK_SCORES // source, 1)):
        columns = F.pad(rows.t(), (0, 0, 0, length * num_lists - source), value=-torch.inf)
        places = list(columns.view(length, num_lists, -1))
        _exchange(places, _sorting_network(length))
        lists = num_lists
        while lists > 1:
            lists //= 2
            # The best of two descending lists, which are then bitonic and need a merge.
            places = [
                torch.maximum(first[:lists], last[lists:])
                for first, last in zip(places, reversed(places), strict=True)
            ]
            _exchange(places, _bitonic_merge(length))
        parts.append(torch.cat(places[:count]))
    return list(torch.cat(parts, dim=1).view(count, *scores.shape[:-1]))


def _exchange(places: list[Tensor], pairs: Iterator[tuple[int, int]]) -> None:
    """Put the larger one of each pair of places first."""
    for i, j in pairs:
        places[i], places[j] = (
            torch.maximum(places[i], places[j]),
            torch.minimum(places[i], places[j]),
        )


def _sorting_network(length: int) -> Iterator[tuple[int, int]]:
    """Comparisons that sort ``length`` places, a power of two (Batcher's odd-even merge sort)."""
    run = 1
    while run < length:
        step = run
        while step >= 1:
            for start in range(step % run, length - step, 2 * step):
                for i in range(start, start + min(step, length - step - start)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        yield i, i + step
            step //= 2
        run *= 2


def _bitonic_merge(length: int) -> Iterator[tuple[int, int]]:
    """Comparisons that sort a bitonic list of ``length`` places."""
    step = length // 2
    while step:
        yield from ((i, i + step) for i in range(length) if not i & step)
        step //= 2
