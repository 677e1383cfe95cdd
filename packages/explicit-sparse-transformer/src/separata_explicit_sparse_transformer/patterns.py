"""Attention patterns with a budget of k keys per query: out-of-window top-k and its baselines.

The authors' preprints "Extremely Sparse Transformer with Top-k Selective Attention" (2022, 2023)
compare top-k with patterns that do not look at the scores. A pattern here is a function from the
keys that may be attended to those of them that it keeps, both boolean ``(..., T, S)``;
``pattern_attention`` makes an attention function of it. Causal and padding masks are therefore
respected by construction. A pattern keeps at most k keys per query; ``global_keys`` says where it
does not.

Query i of T stands at position ``i + S - T`` of the keys, as for the causal flag, so a query has
the same pattern in a whole sequence and in step-by-step decoding. This makes the patterns ones for
self-attention; only ``out_of_window_attention`` with a window of its own makes sense elsewhere.

Shapes: B batch, H heads, T queries, S keys, D width per head.
"""

from collections.abc import Callable
from functools import partial

import torch
from separata_shared.attention import Attend
from torch import Tensor

from .selection import allowed_keys, attention_with, kept_keys, masked_softmax

Pattern = Callable[[Tensor], Tensor]
"""From the allowed keys ``(..., T, S)`` to the kept ones."""


def window(allowed: Tensor, *, top_k: int) -> Tensor:
    """The ``top_k`` keys around the query: ``top_k // 2`` before it, itself, the rest behind.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget.

    Returns:
        The kept keys, like ``allowed``.
    """
    distance = _distances(allowed)
    return allowed & (distance <= top_k // 2) & (distance > top_k // 2 - top_k)


def causal_window(allowed: Tensor, *, top_k: int) -> Tensor:
    """The query's own position and the ``top_k - 1`` before it.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget.

    Returns:
        The kept keys, like ``allowed``.
    """
    distance = _distances(allowed)
    return allowed & (distance >= 0) & (distance < top_k)


def block(allowed: Tensor, *, top_k: int) -> Tensor:
    """The keys of the query's own block, the sequence being cut into blocks of ``top_k``.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget.

    Returns:
        The kept keys, like ``allowed``.
    """
    query, key = _positions(allowed)
    return allowed & (query // top_k == key // top_k)


def dilated(allowed: Tensor, *, top_k: int, dilation: int = 2) -> Tensor:
    """Every ``dilation``-th key around the query, itself included.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget.
        dilation: Distance between two kept keys.

    Returns:
        The kept keys, like ``allowed``.
    """
    distance = _distances(allowed)
    furthest = top_k // 2 * dilation
    near = (distance <= furthest) & (distance > furthest - top_k * dilation)
    return allowed & near & (distance % dilation == 0)


def global_keys(allowed: Tensor, *, top_k: int) -> Tensor:
    """The first ``top_k`` keys for every query, and every key for the first ``top_k`` queries.

    The rows of those first queries may exceed the budget; that is what makes them global.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget of all other rows.

    Returns:
        The kept keys, like ``allowed``.
    """
    query, key = _positions(allowed)
    return allowed & ((key < top_k) | (query < top_k))


def random_keys(allowed: Tensor, *, top_k: int, seed: int = 0) -> Tensor:
    """``top_k`` of the allowed keys, drawn for each query.

    The draw depends on the seed and the two positions alone: a query keeps its keys when the same
    sequence is decoded step by step, and padding at the end changes nothing.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget.
        seed: Seed of the draw.

    Returns:
        The kept keys, like ``allowed``.
    """
    return kept_keys(_draw(allowed, seed), top_k, mask=allowed, ties="exact")


def big_bird(allowed: Tensor, *, top_k: int, seed: int = 0) -> Tensor:
    """Half of the budget as window, a quarter as first keys, the rest drawn at random.

    Unlike in ``global_keys`` no query attends everything: the budget holds in every row.

    Args:
        allowed: Boolean ``(..., T, S)``, True = may attend.
        top_k: Budget, at least 4 to have a part of each kind.
        seed: Seed of the draw.

    Returns:
        The kept keys, like ``allowed``.
    """
    half, quarter = top_k // 2, top_k // 4
    _, key = _positions(allowed)
    fixed = window(allowed, top_k=half) | (allowed & (key < quarter))
    return fixed | random_keys(allowed & ~fixed, top_k=top_k - half - quarter, seed=seed)


def pattern_attention(pattern: Pattern) -> Attend:
    """Softmax attention to the keys that a pattern keeps.

    ``pattern_attention(partial(window, top_k=8))`` is attention to a local window.

    Args:
        pattern: Function from allowed to kept keys.

    Returns:
        Attention function.
    """
    return attention_with(partial(_pattern_softmax, pattern=pattern))


def out_of_window_attention(top_k: int, *, local: Callable[..., Tensor] = window) -> Attend:
    """Half of the budget as local window, half as the highest scores outside it ("OOW").

    The selection then need not spend its places on the neighbours, which are nearly always wanted.

    Args:
        top_k: Keys kept per query: ``top_k // 2`` in the window, the others selected.
        local: The window, called as ``local(allowed, top_k=top_k // 2)``; ``causal_window`` for
            the self-attention of a decoder.

    Returns:
        Attention function.

    Raises:
        ValueError: ``top_k`` is below 2.
    """
    if top_k < 2:
        raise ValueError(f"top_k: must be at least 2, half of it for the window, got {top_k}")
    nearby = partial(local, top_k=top_k // 2)
    selected = top_k - top_k // 2
    return attention_with(partial(_out_of_window_softmax, local=nearby, top_k=selected))


def _pattern_softmax(scores: Tensor, *, mask: Tensor | None, pattern: Pattern) -> Tensor:
    return masked_softmax(scores, pattern(allowed_keys(scores, mask)))


def _out_of_window_softmax(
    scores: Tensor, *, mask: Tensor | None, local: Pattern, top_k: int
) -> Tensor:
    allowed = allowed_keys(scores, mask)
    nearby = local(allowed)
    return masked_softmax(scores, nearby | kept_keys(scores, top_k, mask=allowed & ~nearby))


def _positions(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the queries ``(T, 1)`` and of the keys ``(S,)``."""
    targets, sources = allowed.shape[-2:]
    query = torch.arange(sources - targets, sources, device=allowed.device)
    return query[:, None], torch.arange(sources, device=allowed.device)


def _distances(allowed: Tensor) -> Tensor:
    """How many positions each key lies before the query ``(T, S)``, negative behind it."""
    query, key = _positions(allowed)
    return query - key


def _draw(allowed: Tensor, seed: int) -> Tensor:
    """A number for each pair of positions ``(..., T, S)``, by integer hashing."""
    query, key = _positions(allowed)
    mixed = (query * 0x9E3779B1 + key) * 0x85EBCA77 + seed * 0x27D4EB2F
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        mixed = (mixed ^ (mixed >> 17)) * multiplier & 0xFFFFFFFFFFFF
    return ((mixed ^ (mixed >> 21)) & 0x7FFFFFFF).double().expand(allowed.shape)
