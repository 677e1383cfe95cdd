"""Portable fused top-k attention: scores exist one block at a time, the backward sees k keys a row.

The forward computes the scores of a block of queries, keeps the selected ones as entries (query
row, key, weight) sorted by row, and drops the block. What follows is sums over entries, which
``embedding_bag`` does without atomics: the output, and in the backward the gradient of the queries
by row and those of keys and values by the same entries sorted by key. The kept state is O(T k),
and the backward never selects again.

``R`` is the number of query rows ``B H T``, ``L`` of keys ``B H_kv S`` and ``N`` of entries; ``W``
is the number of keys in a block of scores.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from separata_shared.attention._entries import bias_gradient
from separata_shared.attention._inputs import compute_dtype, show_nan
from separata_shared.attention.topk.kth_largest import kth_largest

# Scores in a block: a few MiB stay in the cache, while a GPU needs many rows.
CPU_BLOCK, GPU_BLOCK = 2**22, 2**26
# Entries whose rows are gathered at a time in the backward, for the same reason.
CPU_CHUNK, GPU_CHUNK = 2**12, 2**22
# Most keys of which one maximum is taken while candidates are searched; blocks hold whole groups.
GROUP = 32


def supports(*, rows: int, keys: int, most_keys: int, return_weights: bool) -> str | None:
    """Give the reason why the call cannot be served, None where it can."""
    if return_weights:
        return "it never holds the weights of all keys"
    if max(rows * most_keys, keys) >= 2**31:
        return "its indices have 32 bits, too few for this many keys"
    return None


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
) -> Tensor:
    """Top-k attention in blocks; arguments as in ``topk_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    k = torch.as_tensor(top_k)
    output: Tensor = _forward(query, key, value, k, mask, bias, causal, ties, dropout)[0]
    return output


@torch.library.custom_op(
    "separata::topk_attention_blocked",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    ties: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; columns ``(N,)`` and weights ``(N,)`` of the entries, offsets ``(R + 1,)``, dropout.

    Columns count through all keys ``(L,)``; dropout is the factor of each weight, or empty.
    """
    dtype = compute_dtype(query, key, value)
    shape = (*query.shape[:3], key.shape[2])
    q = query.to(dtype) * query.shape[3] ** -0.5
    # Whole groups of keys: the scores of the padding become -inf.
    k = F.pad(key.to(dtype), (0, 0, 0, -shape[3] % GROUP))
    mask = None if mask is None else mask.expand(shape)
    bias = None if bias is None else bias.expand(shape)
    rows_k = int(top_k) if top_k.numel() == 1 else top_k.to(query.device).expand(shape[:3])
    repeats = shape[1] // key.shape[1]
    blocks = list(_blocks(shape, repeats, query.device))
    # One buffer for every block: fresh memory costs more than the scores do.
    rows = max(((h.stop - h.start) * (t.stop - t.start) for _, h, t in blocks), default=0)
    buffer = q.new_empty(rows * k.shape[2])

    selected = []
    for b, heads, times in blocks:
        scores = _scores(
            q[b, heads, times],
            k[b, heads.start // repeats : (heads.stop - 1) // repeats + 1],
            buffer,
            mask=None if mask is None else mask[b, heads, times],
            bias=None if bias is None else bias[b, heads, times],
            last=times.start + shape[3] - shape[2] if causal else None,
            source=shape[3],
        )
        block_k = rows_k if isinstance(rows_k, int) else rows_k[b, heads, times].reshape(-1, 1)
        selected.append(_select(scores.flatten(0, 1), block_k, ties))

    columns, weights, counts = (torch.cat(parts) for parts in zip(*selected, strict=True))
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    # Heads that share a key head follow one another in the rows as in the keys.
    first = torch.arange(len(counts), device=query.device) // (repeats * shape[2]) * shape[3]
    entries = (columns + first.repeat_interleave(counts)).int()
    factor = weights.new_empty(0)
    if dropout > 0.0:
        factor = torch.empty_like(weights).bernoulli_(1.0 - dropout).div_(1.0 - dropout)
    used = weights * factor if dropout > 0.0 else weights
    output = _sums(value.to(dtype).flatten(0, 2), entries, offsets, used)
    output = output.view(*shape[:3], -1).to(value.dtype)
    show_nan(output, query, key, mask=mask, bias=bias, causal=causal)
    return output, entries, weights, offsets, factor


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    ties: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    dtype = compute_dtype(query, key, value)
    batch, num_heads, target, _ = query.shape
    return (
        value.new_empty(batch, num_heads, target, value.shape[3]),
        query.new_empty(entries, dtype=torch.int32),
        query.new_empty(entries, dtype=dtype),
        query.new_empty(batch * num_heads * target + 1, dtype=torch.int32),
        query.new_empty(entries if dropout > 0.0 else 0, dtype=dtype),
    )


def _blocks(
    shape: tuple[int, int, int, int], repeats: int, device: torch.device
) -> Iterator[tuple[int, slice, slice]]:
    """Batch element, heads and queries of each block of scores, in the order of the rows.

    A block holds all queries of several heads, whole groups that share a key head, or some queries
    of one head.
    """
    batch, num_heads, target, source = shape
    rows = (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // source
    heads = rows // target // repeats * repeats or 1
    times = target if heads > 1 else max(min(rows, target), 1)
    for b in range(batch):
        for h in range(0, num_heads, heads):
            for t in range(0, target, times):
                yield b, slice(h, min(h + heads, num_heads)), slice(t, min(t + times, target))


def _scores(
    query: Tensor,
    key: Tensor,
    buffer: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    last: int | None,
    source: int,
) -> Tensor:
    """Scores ``(h, t, W)`` of a block, ``-inf`` where a key is not allowed.

    Args:
        query: Scaled, ``(h, t, D)``.
        key: ``(g, W, D)`` with ``h`` a multiple of ``g``, padded to whole groups.
        buffer: Memory for the scores.
        mask: Boolean, ``(h, t, S)``.
        bias: ``(h, t, S)``.
        last: Last key that the first query may attend; None if not causal.
        source: ``S``.
    """
    heads, times, _ = query.shape
    if last is not None:  # no query of the block sees further
        stop = min(max(last + times, 1), source)
        key = key[:, : stop + -stop % GROUP]
    width = key.shape[1]
    scores = buffer[: heads * times * width].view(len(key), -1, width)
    torch.bmm(query.reshape(len(key), -1, query.shape[2]), key.mT, out=scores)
    scores = scores.view(heads, times, width)
    if bias is not None:
        scores[..., :source] += bias[..., :width]
    if mask is not None:
        scores[..., :source].masked_fill_(~mask[..., :width], -torch.inf)
    scores[..., source:] = -torch.inf
    if last is not None:
        columns = torch.arange(width, device=key.device)
        rows = torch.arange(last, last + times, device=key.device).unsqueeze(1)
        scores.masked_fill_(columns > rows, -torch.inf)
    return scores


def _select(scores: Tensor, top_k: int | Tensor, ties: str) -> tuple[Tensor, Tensor, Tensor]:
    """Select in rows of scores ``(rows, W)``.

    Args:
        scores: Scores, ``-inf`` where a key is not allowed.
        top_k: One number or ``(rows, 1)``.
        ties: ``"keep"`` or ``"exact"``.

    Returns:
        Columns and weights of the kept keys, row by row ``(n,)``, and their number ``(rows,)``.
    """
    num_rows = len(scores)
    values, rows, columns = _candidates(scores, top_k)
    counts = torch.bincount(rows, minlength=num_rows)
    width = max(int(counts.max()), 1)
    # Each row moves to the start of a row of a narrow matrix.
    first = torch.arange(num_rows, device=rows.device) * width - (counts.cumsum(0) - counts)
    places = torch.arange(len(rows), device=rows.device) + first.index_select(0, rows)
    packed = scores.new_full((num_rows, width), -torch.inf)
    packed.view(-1).index_copy_(0, places, values)

    threshold = _lowest(kth_largest(packed, top_k))
    keep = packed >= threshold
    if ties == "exact":
        equal = packed == threshold
        above = keep & ~equal
        keep = above | (equal & (equal.cumsum(1) <= top_k - above.sum(dim=1, keepdim=True)))
    weights = packed.masked_fill_(~keep, -torch.inf).softmax(dim=1)
    kept = keep.view(-1).index_select(0, places).nonzero().squeeze(1)
    return (
        columns.index_select(0, kept),
        weights.view(-1).index_select(0, places.index_select(0, kept)),
        keep.sum(dim=1),
    )


def _candidates(scores: Tensor, top_k: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find a few scores of each row ``(rows, W)`` among which are all that may be kept.

    The k-th largest of the maxima of groups of keys is a lower bound of the k-th largest score,
    since k groups have a score that large. Few scores are above it: 9 on average for k = 8. Ties
    are above it or equal to it, too.

    Returns:
        Scores, rows and columns of the candidates, row by row in the order of the keys.
    """
    size = _group_size(scores.shape[1], top_k)
    maxima = scores.view(len(scores), -1, size).amax(dim=2) if size > 1 else scores
    bound = _lowest(kth_largest(maxima, top_k))
    groups = (maxima >= bound).view(-1).nonzero().squeeze(1)
    members = scores.view(-1, size).index_select(0, groups)
    rows = groups // maxima.shape[1]
    found = (members >= bound.index_select(0, rows)).view(-1).nonzero().squeeze(1)
    group = found // size
    columns = groups.index_select(0, group) % maxima.shape[1] * size + found % size
    return members.view(-1).index_select(0, found), rows.index_select(0, group), columns


def _group_size(width: int, top_k: int | Tensor) -> int:
    """Number of keys of which the maximum bounds the threshold.

    There should be two groups for each kept key, so that the bound is close, and fewer than 8 keys
    in a group win nothing.
    """
    k = top_k if isinstance(top_k, int) else int(top_k.max())
    size = GROUP
    while size >= 8:
        if 2 * k * size <= width:
            return size
        size //= 2
    return 1


def _lowest(threshold: Tensor) -> Tensor:
    """Keep a threshold above the ``-inf`` of keys that are not allowed."""
    return threshold.clamp_(min=torch.finfo(threshold.dtype).min)


def _sums(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sum ``weights[n] * rows[index[n]]`` over the entries of each bag."""
    return F.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


@torch.library.custom_op("separata::topk_attention_blocked_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    weights: Tensor,
    offsets: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without one) from the kept entries."""
    dtype = weights.dtype
    scale = query.shape[-1] ** -0.5
    g, q, k, v = (x.to(dtype).flatten(0, 2) for x in (grad, query, key, value))
    rows = torch.arange(len(q), device=q.device, dtype=torch.int32)
    rows = rows.repeat_interleave(offsets.diff())
    used = weights * factor if factor.numel() else weights

    # dA_n = dC_row v_column, dP_n = A_n (dA_n - sum over the row of A dA)
    chunk = CPU_CHUNK if grad.device.type == "cpu" else GPU_CHUNK
    parts = zip(torch.split(rows, chunk), torch.split(columns, chunk), strict=True)
    grad_weights = torch.cat(
        [(g.index_select(0, r) * v.index_select(0, c)).sum(dim=1) for r, c in parts]
    )
    if factor.numel():
        grad_weights *= factor
    mean = torch.segment_reduce(weights * grad_weights, "sum", offsets=offsets.long(), initial=0)
    grad_scores = weights * (grad_weights - mean.index_select(0, rows))

    order = columns.argsort(stable=True)
    key_offsets = F.pad(torch.bincount(columns, minlength=len(k)).cumsum(0), (1, 0)).int()
    key_rows, key_used, key_scores = (x.index_select(0, order) for x in (rows, used, grad_scores))
    grad_bias = query.new_empty(0)
    if bias is not None:
        shape = (*query.shape[:3], key.shape[2])
        grad_bias = bias_gradient(grad_scores, bias, shape, rows, columns % shape[3])
    return (
        (_sums(k, columns, offsets, grad_scores) * scale).view_as(query).to(query.dtype),
        (_sums(q, key_rows, key_offsets, key_scores) * scale).view_as(key).to(key.dtype),
        _sums(g, key_rows, key_offsets, key_used).view_as(value).to(value.dtype),
        grad_bias,
    )


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    weights: Tensor,
    offsets: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    return query, key, value, query.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, _, bias, *_ = inputs
    ctx.bias = bias is not None and ctx.needs_input_grad[5]
    ctx.save_for_backward(query, key, value, bias if ctx.bias else None, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad.contiguous(), *ctx.saved_tensors)
    grad_bias = grads[3] if ctx.bias else None
    return (*grads[:3], None, None, grad_bias, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)
