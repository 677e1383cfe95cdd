"""Fused top-k attention for NVIDIA GPUs, in Triton. Not run on a GPU: checked by the interpreter.

The forward takes the product of queries and keys twice. The first pass keeps maxima over groups of
keys, of which the k-th largest is a lower bound of the k-th largest score. The second appends the
few scores above it to a list of bounded length, among which the selection is exact. The keys of a
list are gathered, so that only k exponentials, values and gradients a row are paid. Of the lists the
kept keys and their weights stay for the backward, O(T k).

A row whose list is full (many scores are equal, or k is larger than was announced) is served without
one: its k-th largest score is found bit by bit, in 31 further passes, and its output and gradients
are products of matrices with all keys. So the result is always exact, only slower. Which rows these
are is known on the device only; nothing waits for it.
"""

import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MOST_KEYS = 256  # of a row; the groups are too few for more
# Where gradients of keys are summed by key, lists of these many keys are handled at a time.
GATHERED = 4096


def supports(
    query: Tensor, key: Tensor, value: Tensor, *, most_keys: int | None, return_weights: bool
) -> str | None:
    """Give the reason why the call cannot be served, None where it can.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        value: ``(B, H_kv, S, D_v)``.
        most_keys: Largest k of a row, at most ``S``; None if unknown.
        return_weights: Whether the weights are asked for.
    """
    if return_weights:
        return "it never holds the weights of all keys"
    if any(x.dtype not in (torch.float32, torch.float16, torch.bfloat16) for x in (query, key, value)):
        return "it computes in float32, for inputs of at most that precision"
    if most_keys is not None and most_keys > MOST_KEYS:
        return f"it keeps at most {MOST_KEYS} keys of a row"
    if max(query.shape[3], value.shape[3]) > 256:
        return "its heads are at most 256 wide"
    if max(query[..., 0].numel(), key[..., 0].numel()) >= 2**31:
        return "its indices have 32 bits, too few for this many keys"
    return _unavailable(query.device.type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unavailable(device: str) -> str | None:
    """The reason why Triton cannot be used on this type of device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; PyTorch for CUDA brings it"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on GPUs, and with TRITON_INTERPRET=1 on the CPU, not on {device}"


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
    most_keys: int | None = None,
) -> Tensor:
    """Top-k attention in fused kernels; arguments as in ``topk_attention``.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        value: ``(B, H_kv, S, D_v)``.
        top_k: One number or a tensor broadcastable to ``(B, H, T)``.
        mask: Boolean, of four dimensions.
        bias: Of four dimensions.
        causal: Whether queries see the past only.
        ties: ``"keep"`` or ``"exact"``.
        dropout: Probability of dropping a weight.
        most_keys: Largest k of a tensor, if it is known; rows with more are served, but slowly.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    rows_k = None
    if isinstance(top_k, Tensor):
        rows_k = top_k.to(query.device)
        top_k = MOST_KEYS if most_keys is None else most_keys
    most = min(top_k, key.shape[2], MOST_KEYS)
    output: Tensor = _forward(query, key, value, rows_k, most, mask, bias, causal, ties, dropout)[0]
    return output


@dataclass(frozen=True)
class _Sizes:
    """Sizes of blocks and lists; those of scores are the same in every kernel of a call."""

    rows: int  # M
    keys: int  # N
    depth: int
    capacity: int
    slots: int
    num_stages: int


def _sizes(query: Tensor, *, most: int, ties: str) -> _Sizes:
    """Choose the sizes; estimates, not measured.

    With N groups and a depth of 1, k up to N / 2 gives 1.4 k candidates on average. Equal scores
    may add some keys to a row beyond the k that its list has room for.
    """
    target, width = query.shape[2:]
    single = query.dtype == torch.float32
    keys = 128 if most > 128 or (width <= 128 and not single) else 64
    rows = (16 if keys == 128 else 32) if single else 64
    return _Sizes(
        rows=min(rows, max(_power_of_two(target), 16)),
        keys=keys,
        depth=_power_of_two(-(-2 * most // keys)),
        capacity=max(2 * _power_of_two(most), 32),
        slots=most if ties == "exact" else most // 4 * 4 + 8,
        num_stages=3 if width <= 64 else 2,
    )


def _power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _kernels() -> ModuleType:
    """Import the kernels; PyTorch without CUDA comes without Triton."""
    from separata_shared.attention.topk import triton_kernels

    return triton_kernels


@torch.library.custom_op(
    "separata::topk_attention_triton",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    most: int,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    ties: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; keys and weights of the lists ``(R, slots)``; limits of rows; seed of dropout.

    The limits of the backward are three floats ``(3, R)`` and two integers ``(2, R)`` for each row.
    ``most`` is k, or the most of ``top_k``.
    """
    kernels = _kernels()
    sizes = _sizes(query, most=most, ties=ties)
    problem = _problem(query, key, value, most if top_k is None else top_k, mask, bias)
    outputs = _empty_outputs(query, value, sizes.slots, dropout)
    output, columns, weights, floats, integers, seed = outputs
    if dropout > 0.0:
        torch.randint(2**62, (1,), device=query.device, out=seed)
    rows = query[..., 0].numel()
    candidates = query.new_empty(rows, sizes.capacity, dtype=torch.int64)
    counts = query.new_empty(rows, dtype=torch.int32)
    limits = kernels.Limits(*floats, *integers)
    random = kernels.Dropout(seed if dropout > 0.0 else None, dropout)
    tiles = (query.shape[0] * query.shape[1] * _cdiv(query.shape[2], sizes.rows),)
    widths, blocks = _widths(query, value), {"M": sizes.rows, "N": sizes.keys}
    kernels.search_kernel[tiles](
        problem,
        candidates,
        counts,
        CAUSAL=causal,
        D=widths["D"],
        BLOCK_D=widths["BLOCK_D"],
        DEPTH=sizes.depth,
        CAPACITY=sizes.capacity,
        num_stages=sizes.num_stages,
        **blocks,
    )
    exact = {"EXACT": ties == "exact", "CAPACITY": sizes.capacity}
    block = max(1, min(16, 1024 // sizes.capacity))
    kernels.select_kernel[(_cdiv(rows, block),)](
        problem,
        candidates,
        counts,
        random,
        output,
        columns,
        weights,
        limits,
        rows,
        D_V=widths["D_V"],
        BLOCK_V=widths["BLOCK_V"],
        SLOTS=sizes.slots,
        BLOCK_R=block,
        C=_chunk(block, widths, sizes.capacity),
        **exact,
    )
    kernels.dense_kernel[tiles](
        problem, counts, random, output, limits, CAUSAL=causal, num_stages=1, **exact, **widths, **blocks
    )
    return outputs


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    most: int,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    ties: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(query, value, _sizes(query, most=most, ties=ties).slots, dropout)


def _empty_outputs(
    query: Tensor, value: Tensor, slots: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for the outputs of the forward; places of lists without a key hold zeros."""
    batch, num_heads, target, _ = query.shape
    rows = batch * num_heads * target
    return (
        value.new_empty(batch, num_heads, target, value.shape[3]),
        query.new_zeros(rows, slots, dtype=torch.int32),
        query.new_zeros(rows, slots, dtype=torch.float32),
        query.new_empty(3, rows, dtype=torch.float32),
        query.new_empty(2, rows, dtype=torch.int32),
        query.new_empty(1 if dropout > 0.0 else 0, dtype=torch.int64),
    )


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: int | Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Any:
    """The scores as the kernels take them."""
    kernels = _kernels()
    batch, num_heads, target, width = query.shape
    dtype = torch.promote_types(query.dtype, key.dtype)
    shape = (batch, num_heads, target, key.shape[2])
    if isinstance(top_k, Tensor):
        k = kernels.Strided(top_k, top_k.expand(shape[:3]).stride())
    else:
        k = kernels.Strided(top_k, None)
    return kernels.Problem(
        query=_strided(query.to(dtype)),
        key=_strided(key.to(dtype)),
        value=_strided(value),
        mask=None if mask is None else _broadcast(mask, shape),
        bias=None if bias is None else _broadcast(bias, shape),
        top_k=k,
        H=num_heads,
        repeats=num_heads // key.shape[1],
        T=target,
        S=key.shape[2],
        scale=width**-0.5,
    )


def _strided(x: Tensor) -> Any:
    return _kernels().Strided(x, x.stride())


def _broadcast(x: Tensor, shape: tuple[int, ...]) -> Any:
    """A mask or bias; kernels read one row where all rows are the same."""
    strides = x.expand(shape).stride()
    rows = None if x.shape[2] == 1 else strides[2]
    return _kernels().Strided(x, (strides[0], strides[1], rows, strides[3]))


def _widths(query: Tensor, value: Tensor) -> dict[str, int]:
    """Widths of heads, and the blocks they are padded to; products take at least 16."""
    width, value_width = query.shape[3], value.shape[3]
    return {
        "D": width,
        "BLOCK_D": max(_power_of_two(width), 16),
        "D_V": value_width,
        "BLOCK_V": max(_power_of_two(value_width), 16),
    }


def _chunk(block: int, widths: dict[str, int], most: int) -> int:
    """How many keys of each row are gathered at a time."""
    widest = max(widths["BLOCK_D"], widths["BLOCK_V"])
    return max(1, min(GATHERED // (block * widest), _power_of_two(most)))


def _cdiv(number: int, size: int) -> int:
    return -(-number // size)


@torch.library.custom_op("separata::topk_attention_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    most: int,
    mask: Tensor | None,
    bias: Tensor | None,
    columns: Tensor,
    weights: Tensor,
    floats: Tensor,
    integers: Tensor,
    seed: Tensor,
    causal: bool,
    ties: str,
    dropout: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty where it is not asked for).

    Keys that several rows keep get sums of their gradients: by atomic additions, or where
    deterministic algorithms are asked for from the lists sorted by key.
    """
    kernels = _kernels()
    sizes = _sizes(query, most=most, ties=ties)
    problem = _problem(query, key, value, most if top_k is None else top_k, mask, bias)
    deterministic = torch.are_deterministic_algorithms_enabled()
    limits = kernels.Limits(*floats, *integers)
    random = kernels.Dropout(seed if dropout > 0.0 else None, dropout)
    upstream, widths = _strided(grad), _widths(query, value)
    rows, blocks = len(columns), {"M": sizes.rows, "N": sizes.keys}

    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (
        torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        for x in (key, value)
    )
    grad_bias = grad_scores = None
    if bias_gradient:
        assert bias is not None
        shape = (*query.shape[:3], key.shape[2])
        # Every score has its own place, so the order of additions does not matter.
        grad_bias = grad.new_zeros(shape if deterministic else bias.shape, dtype=torch.float32)
    if deterministic:
        grad_scores = torch.empty_like(weights)
    places = None if grad_bias is None else _broadcast(grad_bias, (*query.shape[:3], key.shape[2]))
    block = max(1, min(16, 256 // _power_of_two(sizes.slots)))
    lists = {"SLOTS": sizes.slots, "BLOCK_R": block, "C": _chunk(block, widths, sizes.slots)}
    kernels.lists_backward_kernel[(_cdiv(rows, block),)](
        problem,
        upstream,
        columns,
        weights,
        random,
        limits,
        grad_query,
        grad_key,
        grad_value,
        places,
        grad_scores,
        rows,
        **widths,
        **lists,
    )
    if grad_scores is not None:
        order, offsets = _sort_by_key(columns, integers[1], query, key)
        kernels.keys_backward_kernel[(_cdiv(len(offsets) - 1, block),)](
            problem,
            upstream,
            weights,
            random,
            grad_scores,
            order,
            offsets,
            grad_key,
            grad_value,
            len(offsets) - 1,
            **widths,
            **lists,
        )
    means = torch.empty_like(floats[0])
    dense = {"CAUSAL": causal, "num_stages": 1, **widths, **blocks}
    tiles = query.shape[0] * query.shape[1] * _cdiv(query.shape[2], sizes.rows)
    kernels.dense_queries_backward_kernel[(tiles,)](
        problem, upstream, random, limits, grad_query, places, means, **dense
    )
    tiles = key.shape[0] * key.shape[1] * _cdiv(key.shape[2], sizes.keys)
    kernels.dense_keys_backward_kernel[(tiles,)](
        problem, upstream, random, limits, means, grad_key, grad_value, **dense
    )
    if grad_bias is not None:
        assert bias is not None
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    else:
        grad_bias = query.new_empty(0)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias


def _sort_by_key(
    columns: Tensor, sizes: Tensor, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Places in the lists ``(R, slots)`` in the order of keys, and where each key begins there."""
    num_keys = key[..., 0].numel()
    slots = torch.arange(columns.shape[1], device=columns.device)
    rows = torch.arange(len(columns), device=columns.device)
    # Heads that share a key head follow one another in the rows as in the keys.
    first = rows // (query.shape[1] // key.shape[1] * query.shape[2]) * key.shape[2]
    keys = torch.where(slots < sizes.unsqueeze(1), columns + first.unsqueeze(1), num_keys)
    ordered, order = keys.int().flatten().sort(stable=True)
    bounds = torch.arange(num_keys + 1, device=keys.device, dtype=torch.int32)
    return order, torch.searchsorted(ordered, bounds)


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    most: int,
    mask: Tensor | None,
    bias: Tensor | None,
    columns: Tensor,
    weights: Tensor,
    floats: Tensor,
    integers: Tensor,
    seed: Tensor,
    causal: bool,
    ties: str,
    dropout: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    if not bias_gradient:
        return query, key, value, query.new_empty(0)
    assert bias is not None
    return query, key, value, bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, top_k, most, mask, bias, causal, ties, dropout = inputs
    ctx.save_for_backward(query, key, value, top_k, mask, bias, *output[1:])
    ctx.most = most
    ctx.options = causal, ties, dropout, bias is not None and ctx.needs_input_grad[6]


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, top_k, *others = ctx.saved_tensors
    grads = _backward(grad, query, key, value, top_k, ctx.most, *others, *ctx.options)
    grad_bias = grads[3] if ctx.options[3] else None
    return (*grads[:3], None, None, None, grad_bias, None, None, None)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "the backward of top-k attention cannot be differentiated again: its kernels keep the "
        "selected keys only; use impl='reference' for second derivatives"
    )


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)
