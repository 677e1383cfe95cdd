"""Fused top-k attention for NVIDIA GPUs, in Triton; not run on a GPU, checked in the interpreter.

The forward takes the product of queries and keys twice. The first pass keeps maxima over groups of
keys, of which the k-th largest is a lower bound of the k-th largest score. The second appends the
few scores above it to a list of bounded length, among which the selection is exact. The keys of a
list are gathered, so a row pays for k exponentials, values and gradients only. The kept keys and
their weights stay for the backward, O(T k).

A row whose list overflows (many scores are equal, or k is larger than announced) does without one:
its k-th largest score is found bit by bit in 31 further passes, and its output and gradients are
products with all keys. So every row is exact, and such rows are slow. Which rows these are is known
on the device only, and nothing waits for it.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from separata_shared.attention.topk.triton_call import Call, cdiv, choose_sizes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    if any(x.dtype not in DTYPES for x in (query, key, value)):
        return f"it computes in float32, which is too little for {query.dtype}"
    if max(query.shape[3], value.shape[3]) > 256:
        return "its heads are at most 256 wide"
    if most_keys is not None and most_keys > _most_keys(query, value):
        return f"it keeps at most {_most_keys(query, value)} keys of such heads"
    if max(query[..., 0].numel(), key[..., 0].numel()) >= 2**31:
        return "its indices have 32 bits, too few for this many keys"
    return _unavailable(query.device.type)


def _most_keys(query: Tensor, value: Tensor) -> int:
    """Largest k for which there are enough groups of keys in the memory of a multiprocessor."""
    wide = max(query.shape[3], value.shape[3]) > 128
    return 128 if wide and query.dtype == torch.float32 else 256


def _unavailable(device: str) -> str | None:
    """The reason why Triton cannot be used on this type of device."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on GPUs, and with TRITON_INTERPRET=1 on the CPU, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; PyTorch for CUDA brings it"
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
    most_keys: int | None = None,
) -> Tensor:
    """Top-k attention in fused kernels; arguments as in ``topk_attention``.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H_kv, S, D)``.
        value: ``(B, H_kv, S, D_v)``.
        top_k: One number, or a tensor broadcastable to ``(B, H, T)``.
        mask: Boolean, of four dimensions.
        bias: Of four dimensions.
        causal: Whether queries see the past only.
        ties: ``"keep"`` or ``"exact"``.
        dropout: Probability of dropping a weight.
        most_keys: Largest number in ``top_k``, where known; rows with more are served slowly.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    rows_k = None
    if isinstance(top_k, Tensor):
        rows_k, top_k = top_k.to(query.device), most_keys or _most_keys(query, value)
    most = min(top_k, key.shape[2], _most_keys(query, value))
    output: Tensor = _forward(query, key, value, rows_k, most, mask, bias, causal, ties, dropout)[0]
    return output


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

    The limits are three floats ``(3, R)`` and two integers ``(2, R)`` for each row; ``most`` is k,
    or the most of ``top_k``.
    """
    outputs = _empty_outputs(query, value, most, ties, dropout)
    output, keys, weights, floats, integers, seed = outputs
    if dropout > 0.0:
        torch.randint(2**62, (1,), device=query.device, out=seed)
    call = Call(
        query,
        key,
        value,
        top_k=top_k,
        most=most,
        mask=mask,
        bias=bias,
        ties=ties,
        seed=seed,
        dropout=dropout,
    )
    kernels, problem, sizes = call.kernels, call.problem, call.sizes
    limits = kernels.Limits(*floats, *integers)
    candidates = query.new_empty(call.rows, sizes.capacity, dtype=torch.int64)
    counts = query.new_empty(call.rows, dtype=torch.int32)
    tile: dict[str, Any] = {**call.tile, "CAUSAL": causal, "CAPACITY": sizes.capacity}
    exact = ties == "exact"
    with torch.accelerator.device_index(query.device.index):
        kernels.search_kernel[call.query_tiles](
            problem,
            candidates,
            counts,
            DEPTH=sizes.depth,
            num_stages=sizes.num_stages,
            **call.query_width,
            **tile,
        )
        gathering = call.gathering(sizes.capacity)
        kernels.select_kernel[(cdiv(call.rows, gathering["BLOCK_R"]),)](
            problem,
            candidates,
            counts,
            call.dropout,
            output,
            keys,
            weights,
            limits,
            call.rows,
            EXACT=exact,
            CAPACITY=sizes.capacity,
            SLOTS=sizes.slots,
            **call.value_width,
            **gathering,
        )
        kernels.dense_kernel[call.query_tiles](
            problem,
            counts,
            call.dropout,
            output,
            limits,
            EXACT=exact,
            num_stages=1,  # it is rare, and memory for keys loaded ahead is scarce
            **call.widths,
            **tile,
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
    return _empty_outputs(query, value, most, ties, dropout)


def _empty_outputs(
    query: Tensor, value: Tensor, most: int, ties: str, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for the outputs of the forward; unused slots of lists hold zeros."""
    batch, num_heads, target, _ = query.shape
    rows, slots = batch * num_heads * target, choose_sizes(query, value, most=most, ties=ties).slots
    return (
        value.new_empty(batch, num_heads, target, value.shape[3]),
        query.new_zeros(rows, slots, dtype=torch.int32),
        query.new_zeros(rows, slots, dtype=torch.float32),
        query.new_empty(3, rows, dtype=torch.float32),
        query.new_empty(2, rows, dtype=torch.int32),
        query.new_empty(1 if dropout > 0.0 else 0, dtype=torch.int64),
    )


@torch.library.custom_op("separata::topk_attention_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    keys: Tensor,
    weights: Tensor,
    floats: Tensor,
    integers: Tensor,
    seed: Tensor,
    most: int,
    causal: bool,
    ties: str,
    dropout: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty where it is not asked for)."""
    call = Call(
        query,
        key,
        value,
        top_k=top_k,
        most=most,
        mask=mask,
        bias=bias,
        ties=ties,
        seed=seed,
        dropout=dropout,
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads: list[Any] = [
        torch.empty_like(query, memory_format=torch.contiguous_format),
        key.new_zeros(key.shape, dtype=torch.float32),
        value.new_zeros(value.shape, dtype=torch.float32),
    ]
    grad_bias = None
    if with_bias:
        assert bias is not None
        # A place for every score makes the order of additions irrelevant.
        shape = call.scores if deterministic else bias.shape
        grad_bias = bias.new_zeros(shape, dtype=torch.float32)
    grads.append(call.broadcast(grad_bias))
    limits = call.kernels.Limits(*floats, *integers)
    upstream = call.strided(grad)
    with torch.accelerator.device_index(query.device.index):
        _list_gradients(call, upstream, keys, weights, limits, grads, deterministic)
        _dense_gradients(call, upstream, limits, grads, causal)
    if grad_bias is None or bias is None:
        grad_bias = query.new_empty(0)
    else:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), grad_bias


def _list_gradients(
    call: Call,
    upstream: Any,
    keys: Tensor,
    weights: Tensor,
    limits: Any,
    grads: list[Any],
    deterministic: bool,
) -> None:
    """Add the gradients through the lists.

    Keys and values get sums over the rows that keep them: by atomic additions, in any order, or
    from the lists sorted by key, which is deterministic.
    """
    slots, gathering = call.sizes.slots, call.gathering(call.sizes.slots)
    grad_query, grad_key, grad_value, grad_bias = grads
    grad_scores = torch.empty_like(weights) if deterministic else None
    call.kernels.lists_backward_kernel[(cdiv(call.rows, gathering["BLOCK_R"]),)](
        call.problem,
        upstream,
        keys,
        weights,
        call.dropout,
        limits,
        grad_query,
        grad_key,
        grad_value,
        grad_bias,
        grad_scores,
        call.rows,
        SLOTS=slots,
        **call.widths,
        **gathering,
    )
    if deterministic:
        order, offsets = _sort_by_key(keys, limits.size, call)
        num_keys = len(offsets) - 1
        call.kernels.keys_backward_kernel[(cdiv(num_keys, gathering["BLOCK_R"]),)](
            call.problem,
            upstream,
            weights,
            call.dropout,
            grad_scores,
            order,
            offsets,
            grad_key,
            grad_value,
            num_keys,
            SLOTS=slots,
            **call.widths,
            **gathering,
        )


def _sort_by_key(keys: Tensor, sizes: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Places in the lists ``(R, slots)`` in the order of keys, and where each key begins there."""
    batch, num_heads, target, source = call.scores
    repeats = call.problem.repeats
    num_keys = batch * num_heads // repeats * source
    slots = torch.arange(keys.shape[1], device=keys.device)
    rows = torch.arange(len(keys), device=keys.device)
    # Heads that share a key head follow one another in the rows as in the keys.
    first = rows // (repeats * target) * source
    keys = torch.where(slots < sizes.unsqueeze(1), keys + first.unsqueeze(1), num_keys)
    ordered, order = keys.int().flatten().sort(stable=True)
    bounds = torch.arange(num_keys + 1, device=keys.device, dtype=torch.int32)
    return order, torch.searchsorted(ordered, bounds)


def _dense_gradients(
    call: Call, upstream: Any, limits: Any, grads: list[Any], causal: bool
) -> None:
    """Add the gradients through the rows without a list; each program owns what it writes."""
    grad_query, grad_key, grad_value, grad_bias = grads
    means = torch.empty_like(limits.total)
    options = {"CAUSAL": causal, "num_stages": 1, **call.widths, **call.tile}
    call.kernels.dense_queries_backward_kernel[call.query_tiles](
        call.problem, upstream, call.dropout, limits, grad_query, grad_bias, means, **options
    )
    call.kernels.dense_keys_backward_kernel[call.key_tiles](
        call.problem, upstream, call.dropout, limits, means, grad_key, grad_value, **options
    )


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    keys: Tensor,
    weights: Tensor,
    floats: Tensor,
    integers: Tensor,
    seed: Tensor,
    most: int,
    causal: bool,
    ties: str,
    dropout: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    shape = bias.shape if bias is not None and with_bias else (0,)
    return query, key, value, (query if bias is None else bias).new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, top_k, most, mask, bias, causal, ties, dropout = inputs
    with_bias = bias is not None and ctx.needs_input_grad[6]
    ctx.options = most, causal, ties, dropout, with_bias
    ctx.save_for_backward(query, key, value, top_k, mask, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, *ctx.options)
    grad_bias = grads[3] if ctx.options[-1] else None
    return (*grads[:3], None, None, None, grad_bias, None, None, None)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "top-k attention in fused kernels has no second derivative: they compute the first one "
        "without recording how; impl='reference' has all derivatives"
    )


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)
