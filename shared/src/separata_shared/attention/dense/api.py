"""Dense attention: the contract, validation and the choice of an implementation."""

from typing import Literal

import torch
from torch import Tensor

from separata_shared.attention import _select
from separata_shared.attention._inputs import check_inputs, four_dimensional
from separata_shared.attention.dense import eager, reference, sdpa


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    impl: Literal["auto", "reference", "eager", "sdpa"] = "auto",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over all allowed keys.

    ``softmax(q k^T / sqrt(D) + bias) v`` (Vaswani et al. 2017, Eq. 1).

    A row without any allowed key (masked, or all its biases ``-inf``) gives output 0 and gradient
    0. No keys at all (``S = 0``) give zeros. Autocast is off inside: the inputs' dtypes count.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``; ``H`` is a multiple of ``H_kv``, and head ``h`` of the queries
            uses key head ``h // (H / H_kv)``.
        value: ``(B, H_kv, S, D_v)``.
        mask: Boolean, True = may attend, broadcastable to ``(B, H, T, S)``.
        bias: Added to the scaled scores, broadcastable to ``(B, H, T, S)``.
        causal: Query ``i`` attends keys ``j <= i + S - T`` only, so that ``T = 1`` fits a cache.
        dropout: Probability of dropping a weight; kept weights grow by ``1 / (1 - dropout)``.
        impl: Implementation; ``"auto"`` chooses by device and sizes.
        return_weights: Also return the weights.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``; with ``return_weights`` a pair with
        the weights ``(B, H, T, S)`` before dropout, float32 (float64 for float64 inputs).

    Raises:
        ValueError: An argument does not fit, or the named implementation cannot serve the call.
    """
    check_inputs(query, key, value, mask=mask, bias=bias, dropout=dropout)
    mask, bias = four_dimensional(mask), four_dimensional(bias)
    name: str = impl
    if impl == "auto":
        name = _select.dense(
            device=query.device.type,
            dtype=value.dtype,
            source=key.shape[2],
            return_weights=return_weights,
        )
    with torch.autocast(query.device.type, enabled=False):
        if name == "reference":
            output, weights = reference.attend(
                query, key, value, mask=mask, bias=bias, causal=causal, dropout=dropout
            )
            return (output, weights) if return_weights else output
        if name not in ("eager", "sdpa"):
            raise ValueError(f"impl must be 'auto', 'reference', 'eager' or 'sdpa', not {impl!r}")
        implementation = eager if name == "eager" else sdpa
        if reason := implementation.supports(return_weights=return_weights):
            raise ValueError(f"impl {name!r} cannot serve this call: {reason}")
        result: Tensor = implementation.attend(
            query, key, value, mask=mask, bias=bias, causal=causal, dropout=dropout
        )
        return result
