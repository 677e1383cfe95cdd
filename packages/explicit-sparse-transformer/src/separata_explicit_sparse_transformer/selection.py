"""Rules that turn scores into attention weights: the method, its relatives and its baselines.

Rules work on scores ``(..., T, S)`` and give weights of the same shape; ``attention_with`` makes
an attention function of a rule, which goes wherever ``separata_shared.attention.dense_attention``
goes. ``topk_attention`` of the shared library is the method itself, ``topk_softmax`` its rule.

Zhao et al. 2019, "Explicit Sparse Transformer" (arXiv 1912.11637). "Authors' code" is
``lancopku/Explicit-Sparse-Transformer`` at commit fa0841d.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, TypedDict, Unpack

import entmax
import torch
import torch.nn.functional as F
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.attention.topk.reference import select
from torch import Tensor, nn

Ties = Literal["keep", "exact"]
Output = Tensor | tuple[Tensor, Tensor]

_OFFICIAL_MASK = -1e9  # what the authors' tensor2tensor code adds to masked and to removed scores


class AttendOptions(TypedDict, total=False):
    """Keyword arguments that every attention function understands."""

    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    dropout: float
    return_weights: bool


def kept_keys(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """Which keys belong to the ``top_k`` highest scores of their row.

    Args:
        scores: Scores ``(..., T, S)``.
        top_k: Keys kept per row, at least 1; a tensor is broadcast to ``(..., T)``. More than
            there are allowed keys keeps all of them.
        mask: Boolean, broadcastable to the scores; True = may be kept. None allows every key.
        ties: ``"keep"`` keeps every key equal to the k-th score, ``"exact"`` keeps k, lowest
            index first.

    Returns:
        Boolean tensor like ``scores``; a row without an allowed key is False throughout.
    """
    scores = scores.detach()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return select(scores, top_k, ties=ties)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the keys where ``mask`` is True, computed in at least single precision.

    Args:
        scores: Scores ``(..., T, S)``.
        mask: Boolean, broadcastable to the scores; True = takes part.

    Returns:
        Weights ``(..., T, S)`` in the scores' dtype, exactly 0 where ``mask`` is False; a row
        without any True is 0 and passes no gradient.
    """
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(exact.dtype).min
    weights = exact.masked_fill(~mask, lowest).softmax(dim=-1).masked_fill(~mask, 0.0)
    return weights.to(scores.dtype)


def topk_softmax(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """Softmax over the ``top_k`` highest scores of every row (Zhao et al. 2019, Eq. 3 to 5).

    ``A_ij = exp(P_ij) / sum_{l in kept_i} exp(P_il)`` for the kept keys, 0 for the others. The
    threshold is a constant of the backward pass.

    Args:
        scores: Scores P ``(..., T, S)``.
        top_k: Keys kept per row; a tensor is broadcast to ``(..., T)``.
        mask: Boolean, broadcastable to the scores; True = may attend. Masking comes first.
        ties: See ``kept_keys``.

    Returns:
        Weights A ``(..., T, S)``; rows without an allowed key are 0.
    """
    return masked_softmax(scores, kept_keys(scores, top_k, mask=mask, ties=ties))


def straight_through_topk_softmax(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """``topk_softmax`` forward, the gradient of the dense softmax backward.

    Args:
        scores: Scores ``(..., T, S)``.
        top_k: Keys kept per row; a tensor is broadcast to ``(..., T)``.
        mask: Boolean, broadcastable to the scores; True = may attend.
        ties: See ``kept_keys``.

    Returns:
        Weights ``(..., T, S)``, equal to those of ``topk_softmax``.
    """
    dense = masked_softmax(scores, allowed_keys(scores, mask))
    sparse = topk_softmax(scores, top_k, mask=mask, ties=ties)
    return sparse.detach() + (dense - dense.detach())


def softmax_topk(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """Softmax over all keys, then the weights below the k-th largest become 0.

    Rows sum to less than one. This order is the default of the authors' tensor2tensor code
    (``before_softmax=False``), not the paper's method.

    Args:
        scores: Scores ``(..., T, S)``.
        top_k: Keys kept per row; a tensor is broadcast to ``(..., T)``.
        mask: Boolean, broadcastable to the scores; True = may attend.
        ties: See ``kept_keys``.

    Returns:
        Weights ``(..., T, S)``.
    """
    dense = masked_softmax(scores, allowed_keys(scores, mask))
    return dense.masked_fill(~kept_keys(dense, top_k, mask=mask, ties=ties), 0.0)


def softmax_topk_softmax(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """``softmax_topk`` followed by a second softmax over the kept *probabilities*.

    The second softmax sees numbers in [0, 1], so its weights are much flatter (authors'
    tensor2tensor code, ``softmax_again=True``).

    Args:
        scores: Scores ``(..., T, S)``.
        top_k: Keys kept per row; a tensor is broadcast to ``(..., T)``.
        mask: Boolean, broadcastable to the scores; True = may attend.
        ties: See ``kept_keys``.

    Returns:
        Weights ``(..., T, S)``.
    """
    dense = masked_softmax(scores, allowed_keys(scores, mask))
    return masked_softmax(dense, kept_keys(dense, top_k, mask=mask, ties=ties))


def joint_heads_topk_softmax(
    scores: Tensor, top_k: int, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """One threshold per query over all heads: the ``H * top_k`` largest of ``H * S`` scores.

    A head of which nothing is selected gets weight 0 everywhere. The authors' code makes it
    uniform instead; see ``official_joint_heads_softmax``.

    Args:
        scores: Scores ``(B, H, T, S)``.
        top_k: Keys kept per query and head, on average over the heads.
        mask: Boolean, broadcastable to the scores; True = may attend.
        ties: See ``kept_keys``; the index order is head first, then key.

    Returns:
        Weights ``(B, H, T, S)``.
    """
    return masked_softmax(scores, _kept_over_heads(scores, top_k, mask, ties))


def official_joint_heads_softmax(
    scores: Tensor, top_k: int, *, mask: Tensor | None = None
) -> Tensor:
    """The authors' ``ensemble``: removed scores get -1e9 *added* instead of being excluded.

    In single precision the addition swallows the scores of a head of which nothing is selected:
    that head attends uniformly.

    Args:
        scores: Scores ``(B, H, T, S)``.
        top_k: Keys kept per query and head, on average over the heads.
        mask: Boolean, broadcastable to the scores; True = may attend. Masked scores get -1e9.

    Returns:
        Weights ``(B, H, T, S)``.
    """
    if mask is not None:
        scores = scores + (~mask).to(scores.dtype) * _OFFICIAL_MASK
    removed = ~_kept_over_heads(scores, top_k, None, "keep")
    return (scores + removed.to(scores.dtype) * _OFFICIAL_MASK).softmax(dim=-1)


def selection_before_masking_softmax(
    scores: Tensor, top_k: int | Tensor, *, mask: Tensor | None = None, ties: Ties = "keep"
) -> Tensor:
    """Selection first, mask afterwards: a compatibility mode that can look at masked keys.

    Masked keys may take the k places. Where all selected keys of a row are masked, kept and
    removed scores both lie near -1e9 and the row becomes a nearly uniform mixture that includes
    masked, even future, keys (authors' tensor2tensor code, ``before_padding=True``, which the
    published recipe does not use).

    Args:
        scores: Scores ``(..., T, S)``.
        top_k: Keys kept per row; a tensor is broadcast to ``(..., T)``.
        mask: Boolean, broadcastable to the scores; True = may attend. Masked scores get -1e9.
        ties: See ``kept_keys``.

    Returns:
        Weights ``(..., T, S)``.
    """
    removed = ~kept_keys(scores, top_k, ties=ties)
    scores = scores + removed.to(scores.dtype) * _OFFICIAL_MASK
    if mask is not None:
        scores = scores + (~mask).to(scores.dtype) * _OFFICIAL_MASK
    return scores.softmax(dim=-1)


def sparsemax(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Sparsemax of every row (Martins and Astudillo 2016), by the ``entmax`` library.

    Args:
        scores: Scores ``(..., T, S)``.
        mask: Boolean, broadcastable to the scores; True = may attend.

    Returns:
        Weights ``(..., T, S)``; rows without an allowed key are 0.
    """
    return _projection(entmax.sparsemax, scores, mask)


def entmax15(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """1.5-entmax of every row (Peters et al. 2019), by the ``entmax`` library.

    Args:
        scores: Scores ``(..., T, S)``.
        mask: Boolean, broadcastable to the scores; True = may attend.

    Returns:
        Weights ``(..., T, S)``; rows without an allowed key are 0.
    """
    return _projection(entmax.entmax15, scores, mask)


def _projection(project: Callable[..., Tensor], scores: Tensor, mask: Tensor | None) -> Tensor:
    allowed = allowed_keys(scores, mask)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The library fails on a row of -inf only; such a row is computed on zeros and then emptied.
    exact = exact.masked_fill(~allowed & allowed.any(dim=-1, keepdim=True), -math.inf)
    exact = exact.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    return project(exact, dim=-1).masked_fill(~allowed, 0.0).to(scores.dtype)


def allowed_keys(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Keys of each row that the mask and scores of ``-inf`` leave, boolean ``(..., T, S)``."""
    allowed = scores.detach() != -math.inf
    return allowed if mask is None else allowed & mask


def _kept_over_heads(scores: Tensor, top_k: int, mask: Tensor | None, ties: Ties) -> Tensor:
    heads, size = scores.shape[1], scores.shape[-1]
    joint = scores.transpose(1, 2).flatten(2)  # (B, T, H * S)
    if mask is not None:
        mask = mask.expand(scores.shape).transpose(1, 2).flatten(2)
    kept = kept_keys(joint, heads * min(top_k, size), mask=mask, ties=ties)
    return kept.reshape(*kept.shape[:2], heads, size).transpose(1, 2)


class Normalise(Protocol):
    """A function from scores ``(B, H, T, S)`` and a mask to weights ``(B, H, T, S)``."""

    def __call__(self, scores: Tensor, *, mask: Tensor | None) -> Tensor:
        """Give the weights."""
        ...


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalise: Normalise,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Output:
    """Attention with any rule that turns scores into weights.

    ``normalise(query key^T / sqrt(D) + bias) value``.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``, H_kv a divisor of H.
        value: ``(B, H_kv, S, D_v)``.
        normalise: Rule from scores and mask to weights.
        mask: Boolean, broadcastable to ``(B, H, T, S)``; True = may attend.
        bias: Added to the scaled scores; broadcastable to ``(B, H, T, S)``.
        causal: Query i may attend key j only if ``j <= i + S - T``.
        dropout: Probability of dropping a weight.
        return_weights: Also return the weights before dropout.

    Returns:
        Output ``(B, H, T, D_v)``, with the weights ``(B, H, T, S)`` if asked for.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    if causal:
        past = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        past = past.tril(key.shape[-2] - query.shape[-2])
        mask = past if mask is None else mask & past
    with torch.autocast(query.device.type, enabled=False):
        scaled = query.to(dtype) * query.shape[-1] ** -0.5
        scores = scaled @ key.to(dtype).repeat_interleave(group, dim=1).mT
        if bias is not None:
            scores = scores + bias
        weights = normalise(scores, mask=mask)
        dropped = F.dropout(weights, dropout)
        output = (dropped @ value.to(dtype).repeat_interleave(group, dim=1)).to(value.dtype)
    return (output, weights) if return_weights else output


def attention_with(normalise: Normalise) -> Attend:
    """Attention function whose weights come from ``normalise``.

    ``attention_with(partial(softmax_topk, top_k=8))`` is attention that selects after the softmax.

    Args:
        normalise: Rule from scores and mask to weights.

    Returns:
        Attention function.
    """
    return partial(weighted_attention, normalise=normalise)


sparsemax_attention = attention_with(sparsemax)
entmax15_attention = attention_with(entmax15)


def official_top_k(div: float, lower_bound: int, num_keys: int) -> int | None:
    """The k of the authors' options ``div`` and ``lb``.

    ``div < 0`` is the fixed number ``-div``, ``div > 0`` the share ``ceil(num_keys / div)`` raised
    to ``lower_bound``; neither exceeds ``num_keys``.

    Args:
        div: The authors' option of that name.
        lower_bound: The authors' option ``lb``.
        num_keys: Keys of the batch, padding included; when decoding, the keys seen so far.

    Returns:
        Keys kept per query, or None for dense attention (``div = 0``).
    """
    if div == 0:
        return None
    wanted = int(-div) if div < 0 else max(math.ceil(num_keys / div), lower_bound)
    return min(wanted, num_keys)


def official_ratio_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    div: float,
    lower_bound: int = 0,
    **options: Unpack[AttendOptions],
) -> Output:
    """Top-k attention with the k of ``official_top_k``, a share of the *padded* key length.

    Training and cached decoding keep different keys and more padding keeps more keys;
    ``topk_attention(ratio=...)`` is the rule without these effects.
    """
    top_k = official_top_k(div, lower_bound, key.shape[-2])
    if top_k is None:
        return dense_attention(query, key, value, **options)
    return topk_attention(query, key, value, top_k=top_k, **options)


class PhaseSwitch(nn.Module):
    """Attention function that differs between training and prediction (``self.training``).

    Args:
        train: Attention function or module used in training mode.
        predict: Attention function or module used in evaluation mode.
    """

    def __init__(self, *, train: Attend, predict: Attend) -> None:
        super().__init__()
        self.train_attend = train
        self.predict_attend = predict

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[AttendOptions]
    ) -> Output:
        """Attend with the function of the present phase; shapes as for ``topk_attention``."""
        attend = self.train_attend if self.training else self.predict_attend
        return attend(query, key, value, **options)


def linear_top_k(start: int, end: int, steps: int) -> Callable[[int], int]:
    """Schedule of k that moves linearly from ``start`` to ``end`` over ``steps`` updates.

    Args:
        start: k at update 0.
        end: k from update ``steps`` on.
        steps: Number of updates of the way, at least 1.

    Returns:
        Function from the update's index to k.

    Raises:
        ValueError: ``start``, ``end`` or ``steps`` is below 1.
    """
    if min(start, end, steps) < 1:
        raise ValueError(f"start, end and steps must be at least 1, got {start}, {end}, {steps}")

    def top_k(step: int) -> int:
        return round(start + (end - start) * min(max(step, 0) / steps, 1.0))

    return top_k
