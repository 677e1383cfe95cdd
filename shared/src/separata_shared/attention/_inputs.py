"""What every attention operation asks of its arguments, and the masks they have in common."""

import torch
from torch import Tensor


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> None:
    """Check the arguments that mean the same in every attention operation.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``, ``H`` a multiple of ``H_kv``.
        value: ``(B, H_kv, S, D_v)``.
        mask: Boolean, broadcastable to ``(B, H, T, S)``.
        bias: Floating, broadcastable to ``(B, H, T, S)``.
        dropout: Probability in ``[0, 1)``.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a floating tensor of 4 dimensions (batch, heads, length, width), "
                f"not {tuple(tensor.shape)} of {tensor.dtype}"
            )
    batch, num_heads, target, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(
            f"key {tuple(key.shape)} must have the batch and the width of query "
            f"{tuple(query.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value {tuple(value.shape)} must have the batch, heads and length of key "
            f"{tuple(key.shape)}"
        )
    if key.shape[1] == 0 or num_heads % key.shape[1]:
        raise ValueError(f"query has {num_heads} heads, no multiple of key's {key.shape[1]} heads")
    scores = (batch, num_heads, target, key.shape[2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = may attend), not {mask.dtype}")
        check_broadcast("mask", mask, scores)
    if bias is not None:
        if not bias.is_floating_point():
            raise ValueError(f"bias must be a floating tensor, not {bias.dtype}")
        check_broadcast("bias", bias, scores)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ``ValueError`` naming the tensor unless it broadcasts to ``shape``."""
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or any(size not in (1, full) for size, full in pairs):
        raise ValueError(f"{name} {tuple(tensor.shape)} must be broadcastable to {shape}")


def four_dimensional(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias with leading dimensions of size 1 up to ``(B, H, T, S)``."""
    return tensor if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision of scores and weights: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def causal_mask(target: int, source: int, device: torch.device) -> Tensor:
    """Boolean ``(T, S)``: query i may attend key j where ``j <= i + S - T``."""
    allowed = torch.ones(target, source, dtype=torch.bool, device=device)
    return allowed.tril(source - target)


def allowed_keys(
    mask: Tensor | None, *, causal: bool, target: int, source: int, device: torch.device
) -> Tensor | None:
    """The mask together with causality, broadcastable to ``(B, H, T, S)``; None where all may."""
    if not causal:
        return mask
    past = causal_mask(target, source, device)
    return past if mask is None else mask & past


def show_nan(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> None:
    """Fill rows of ``output`` with NaN where a score is NaN or infinite, as softmax would.

    A selection by comparisons leaves NaN out, so a model that diverged would pass for a sound one.
    Sums of the inputs tell whether there may be such a score; only then are all scores looked at.
    For a few queries the keys are not summed, which would cost as much as half of a kernel.

    Args:
        output: ``(B, H, T, D_v)``, changed in place.
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        mask: As in ``check_inputs``, of four dimensions.
        bias: As in ``check_inputs``, of four dimensions.
        causal: As in ``allowed_keys``.
    """
    sums = [query.sum(dtype=torch.float32)]
    if query.shape[2] >= 16:
        sums.append(key.sum(dtype=torch.float32))
    if bias is not None:
        sums.append(bias.amax().clamp(min=0))  # -inf is sound there
    if bool(torch.stack(sums).isfinite().all()):
        return
    dtype = compute_dtype(query, key)
    batch, num_heads, target, _ = query.shape
    shape = (batch, num_heads, target, key.shape[2])
    k = repeat_heads(key.to(dtype), num_heads).mT
    allowed = allowed_keys(mask, causal=causal, target=target, source=shape[3], device=query.device)
    rows = max(2**24 // (batch * num_heads * shape[3]), 1)
    for first in range(0, target, rows):
        part = slice(first, first + rows)
        scores = query[:, :, part].to(dtype) @ k
        if bias is not None:
            scores += bias.expand(shape)[:, :, part]
        bad = scores.isnan() | (scores == torch.inf)
        if allowed is not None:
            bad &= allowed.expand(shape)[:, :, part]
        output[:, :, part].masked_fill_(bad.any(dim=-1, keepdim=True), torch.nan)


def repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Give each query head its key or value head: ``(B, H_kv, S, D)`` to ``(B, H, S, D)``."""
    repeats = num_heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)
