"""Top-k attention: the contract, validation and the choice of an implementation."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from separata_shared.attention import _select
from separata_shared.attention._inputs import (
    allowed_keys,
    check_broadcast,
    check_inputs,
    compute_dtype,
    four_dimensional,
)
from separata_shared.attention.dense import dense_attention
from separata_shared.attention.topk import blocked, eager, native, reference, triton


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    top_k: int | Tensor | None = None,
    ratio: float | None = None,
    min_keys: int = 1,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    ties: Literal["keep", "exact"] = "keep",
    dropout: float = 0.0,
    impl: Literal["auto", "reference", "eager", "blocked", "native", "triton"] = "auto",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the k highest-scoring allowed keys of each query.

    ``softmax(M) v`` with ``M = P`` where ``P >= t`` and ``-inf`` elsewhere, ``P = q k^T / sqrt(D)
    + bias`` and ``t`` the k-th largest score of the row (Zhao et al. 2019, arXiv:1912.11637).

    Masking comes before the selection. Rows with fewer than k allowed keys keep them all; k of
    at least ``S`` is dense attention. A row without any allowed key gives output 0 and gradient 0.
    The selection is a constant of the backward pass: removed keys get no gradient through this
    query. Scores are computed and compared in float32 for half-precision inputs, and in float64
    for float64 ones; autocast is off inside.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``; ``H`` is a multiple of ``H_kv``, and head ``h`` of the queries
            uses key head ``h // (H / H_kv)``.
        value: ``(B, H_kv, S, D_v)``.
        top_k: Number of keys to keep, at least 1: one for all rows, or an integer tensor
            broadcastable to ``(B, H, T)``, such as ``(H, 1)``. Either this or ``ratio``.
        ratio: Keep ``max(ceil(n / ratio), min_keys)`` of the ``n`` allowed keys of each row. The
            count is that of the row, so padding and cached decoding change nothing.
        min_keys: Least k of the ratio rule; has no effect with ``top_k``.
        mask: Boolean, True = may attend, broadcastable to ``(B, H, T, S)``.
        bias: Added to the scaled scores, broadcastable to ``(B, H, T, S)``; keys with a bias of
            ``-inf`` are never kept, but count for ``ratio``.
        causal: Query ``i`` attends keys ``j <= i + S - T`` only, so that ``T = 1`` fits a cache.
        ties: ``"keep"`` keeps every key equal to the threshold, so a row may keep more than k;
            ``"exact"`` keeps exactly k, the lowest key index wins.
        dropout: Probability of dropping a weight; kept weights grow by ``1 / (1 - dropout)``.
        impl: Implementation; ``"auto"`` chooses by device and sizes.
        return_weights: Also return the weights.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``; with ``return_weights`` a pair with
        the weights ``(B, H, T, S)`` before dropout, float32 (float64 for float64 inputs). A row
        with a score of NaN is NaN, as in dense attention. Left out like a small score it
        is by ``"triton"``, and by ``"native"`` and ``"blocked"`` where T < 16 and a key is NaN.

    Raises:
        ValueError: An argument does not fit, or the named implementation cannot serve the call.
    """
    check_inputs(query, key, value, mask=mask, bias=bias, dropout=dropout)
    mask, bias = four_dimensional(mask), four_dimensional(bias)
    if ties not in ("keep", "exact"):
        raise ValueError(f"ties must be 'keep' or 'exact', not {ties!r}")
    k, most_keys = rows_top_k(
        query, key, top_k=top_k, ratio=ratio, min_keys=min_keys, mask=mask, causal=causal
    )
    source = key.shape[2]
    dense = impl == "auto" and isinstance(k, int) and k >= source
    if dense or source == 0 or query.numel() == 0:
        return dense_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout=dropout,
            return_weights=return_weights,
        )
    most_keys = None if most_keys is None else min(most_keys, source)
    reasons = unsupported(query, key, value, most_keys=most_keys, return_weights=return_weights)
    name: str = impl
    if impl == "auto":
        name = _select.topk(
            device=query.device.type,
            dtype=value.dtype,
            target=query.shape[2],
            source=source,
            most_keys=most_keys,
            unsupported=reasons,
        )
    if name not in reasons:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(reasons)}, not {impl!r}")
    if reason := reasons[name]:
        raise ValueError(f"impl {name!r} cannot serve this call: {reason}")
    options: dict[str, Any] = {"mask": mask, "bias": bias, "causal": causal}
    options |= {"ties": ties, "dropout": dropout}
    with torch.autocast(query.device.type, enabled=False):
        if name in ("reference", "eager"):
            implementation = reference if name == "reference" else eager
            output, weights = implementation.attend(query, key, value, k, **options)
            return (output, weights) if return_weights else output
        if name == "triton":  # makes room for k keys, and does not wait to read a tensor of them
            options["most_keys"] = most_keys
        fused = {"native": native, "blocked": blocked, "triton": triton}[name]
        result: Tensor = fused.attend(query, key, value, k, **options)
        return result


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, most_keys: int | None, return_weights: bool
) -> dict[str, str | None]:
    """For each implementation the reason why it cannot serve the call, None where it can.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        value: ``(B, H_kv, S, D_v)``.
        most_keys: Largest k of a row, at most ``S``; None if unknown.
        return_weights: Whether the weights are asked for.
    """
    most = key.shape[2] if most_keys is None else most_keys
    sizes: dict[str, Any] = {"rows": query[..., 0].numel(), "most_keys": most}
    sizes["return_weights"] = return_weights
    dtype = compute_dtype(query, key, value)
    return {
        "native": native.supports(device=query.device.type, dtype=dtype, **sizes),
        "triton": triton.supports(
            query, key, value, most_keys=most_keys, return_weights=return_weights
        ),
        "blocked": blocked.supports(keys=key[..., 0].numel(), **sizes),
        "eager": None,
        "reference": None,
    }


def rows_top_k(
    query: Tensor,
    key: Tensor,
    *,
    top_k: int | Tensor | None,
    ratio: float | None,
    min_keys: int,
    mask: Tensor | None,
    causal: bool,
) -> tuple[int | Tensor, int | None]:
    """The k of each row, broadcastable to ``(B, H, T)``, and its maximum where that is known."""
    source = key.shape[2]
    if (top_k is None) == (ratio is None):
        raise ValueError("exactly one of top_k and ratio must be given")
    if ratio is None:
        assert top_k is not None
        k = check_top_k(top_k, (query.shape[0], query.shape[1], query.shape[2]))
        return k, k if isinstance(k, int) else None
    if not ratio > 0.0:
        raise ValueError(f"ratio must be positive, not {ratio}")
    if min_keys < 1:
        raise ValueError(f"min_keys must be at least 1, not {min_keys}")
    most_keys = max(math.ceil(source / ratio), min_keys)
    if mask is None and not causal:
        return most_keys, most_keys
    allowed = count_allowed(
        mask, causal=causal, target=query.shape[2], source=source, device=query.device
    )
    # float64 divides exactly where the quotient is whole
    return (allowed.double() / ratio).ceil().long().clamp(min=min_keys), most_keys


def check_top_k(top_k: int | Tensor, rows: tuple[int, int, int]) -> int | Tensor:
    """Check a given k against the rows ``(B, H, T)``."""
    if isinstance(top_k, Tensor):
        if top_k.is_floating_point() or top_k.is_complex() or top_k.dtype == torch.bool:
            raise ValueError(f"top_k must be an integer or an integer tensor, not {top_k.dtype}")
        check_broadcast("top_k", top_k, rows)
        # Reading a value would stall a GPU and break a compiled graph.
        readable = top_k.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and bool((top_k < 1).any()):
            raise ValueError(f"top_k must be at least 1 everywhere, not {int(top_k.min())}")
        return top_k.long()
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"top_k must be an integer or an integer tensor, not {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    return top_k


def count_allowed(
    mask: Tensor | None, *, causal: bool, target: int, source: int, device: torch.device
) -> Tensor:
    """Number of keys each row may attend, broadcastable to ``(B, H, T)``."""
    if mask is None:
        return torch.arange(source - target + 1, source + 1, device=device).clamp(min=0)
    if mask.dim() == 0 or mask.shape[-1] != source:
        mask = mask.expand(*mask.shape[:-1], source)
    if causal and (mask.dim() == 1 or mask.shape[-2] == 1):
        # Keys are counted once and read at the last one of each row: no (T, S) mask.
        count = F.pad(mask.cumsum(dim=-1), (1, 0))
        last = torch.arange(source - target + 1, source + 1, device=device).clamp(min=0)
        return (count if mask.dim() == 1 else count.squeeze(-2)).index_select(-1, last)
    allowed = allowed_keys(mask, causal=causal, target=target, source=source, device=device)
    assert allowed is not None
    return allowed.sum(dim=-1)
