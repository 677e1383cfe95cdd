"""Top-k attention on a CPU in C++ (``native.cpp``), compiled on first use.

It never holds a ``(T, S)`` tensor: scores of a few queries at a time stay in cache, and for the
backward it keeps the columns and weights of the kept keys, ``N`` entries row by row.
"""

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from separata_shared import native
from separata_shared.attention._entries import bias_gradient
from separata_shared.attention._inputs import show_nan

SOURCE = Path(__file__).with_name("native.cpp")
# Instructions to use, for tests: a number from 0 to the machine's best; None is the best.
LEVEL: int | None = None
_STRIDE = ctypes.c_int64 * 3
_STRIDE4 = ctypes.c_int64 * 4


class Problem(ctypes.Structure):
    """The arguments of the kernels; mirrors ``Problem`` of ``native.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "num_heads", "num_kv_heads", "target")),
        *((name, ctypes.c_int64) for name in ("source", "width", "value_width")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_stride", _STRIDE) for name in ("query", "key", "value")),
        ("mask", ctypes.c_void_p),
        ("mask_stride", _STRIDE4),
        ("bias", ctypes.c_void_p),
        ("bias_stride", _STRIDE4),
        ("top_k", ctypes.c_void_p),
        ("top_k_stride", _STRIDE),
        *((name, ctypes.c_int64) for name in ("most_keys", "causal", "exact_ties", "seed")),
        *((name, ctypes.c_int64) for name in ("threads", "level", "is_bf16")),
        ("dropout", ctypes.c_double),
        ("output", ctypes.c_void_p),
        ("output_stride", _STRIDE),
    )


class Gradients(ctypes.Structure):
    """What the backward reads and writes; mirrors ``Gradients`` of ``native.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "columns", "weights", "scores")),
        ("output", ctypes.c_void_p),
        ("output_stride", _STRIDE),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_stride", _STRIDE) for name in ("query", "key", "value")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        UnavailableError: They cannot be compiled here.
    """
    kernels = native.load(SOURCE)
    kernels.topk_best_level.restype = ctypes.c_int64
    kernels.topk_level_name.restype = ctypes.c_char_p
    kernels.topk_level_name.argtypes = [ctypes.c_int64]
    kernels.topk_forward.restype = ctypes.c_void_p
    kernels.topk_forward.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(ctypes.c_int64)]
    kernels.topk_entries.argtypes = [ctypes.c_void_p] * 4
    kernels.topk_entries.restype = None
    kernels.topk_backward.argtypes = [ctypes.POINTER(Problem), ctypes.POINTER(Gradients)]
    return kernels


def available() -> bool:
    """Whether the kernels can be used; warns once where they cannot."""
    return _available()


# The mark of torch.compiler.assume_constant_result, which would import the compiler.
available.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _available() -> bool:
    try:
        library()
    except native.UnavailableError as error:
        warnings.warn(f"top-k attention uses slower PyTorch code: {error}", stacklevel=2)
        return False
    return True


def supports(
    *, device: str, dtype: torch.dtype, rows: int, most_keys: int, return_weights: bool
) -> str | None:
    """Give the reason why the call cannot be served, None where it can."""
    if return_weights:
        return "it never holds the weights of all keys"
    if device != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype == torch.float64:
        return "it computes in float32"
    if rows * most_keys >= 2**31:
        return "its indices have 32 bits, too few for this many entries"
    return None if available() else "it could not be compiled"


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
    """Top-k attention by the C++ kernels; arguments as in ``topk_attention``.

    Returns:
        Output ``(B, H, T, D_v)`` in the dtype of ``value``.
    """
    k = torch.as_tensor(top_k)
    arguments = (query, key, value, k, mask, bias, causal, ties, dropout)
    output: Tensor
    if torch.compiler.is_compiling():
        output = _forward(*arguments)[0]
    # The dispatcher's detours cost 0.2 ms a call, as much as the kernel for a short sequence.
    elif torch.is_grad_enabled():
        output = _Direct.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        output = run_forward(*arguments)[0]
    return output


def run_forward(
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
    """Output; columns ``(N,)``, weights ``(N,)`` and offsets ``(B H T + 1,)``; seed of dropout."""
    batch, num_heads, target, _ = query.shape
    source = key.shape[2]
    seed = torch.randint(2**62, (1,)) if dropout > 0.0 else top_k.new_empty(0)
    q, k, v = _prepared(query, key, value)
    output = _empty(query, v.shape[3], v.dtype)
    problem = _problem(q, k, v, causal=causal, dropout=dropout, seed=seed)
    problem.most_keys = min(int(top_k.max()), source)
    problem.exact_ties = ties == "exact"
    arguments = {"top_k": top_k.expand(batch, num_heads, target), "output": output}
    if mask is not None:
        arguments["mask"] = mask.expand(batch, num_heads, target, source)
    if bias is not None:
        arguments["bias"] = bias.float().expand(batch, num_heads, target, source)
    _point(problem, **arguments)

    number = ctypes.c_int64()
    kept = library().topk_forward(problem, number)
    if not kept:
        raise MemoryError("no memory for top-k attention")
    if number.value >= 2**31:
        library().topk_entries(kept, None, None, None)
        raise ValueError(f"{number.value} kept keys are too many; ties='exact' keeps fewer")
    columns = torch.empty(number.value, dtype=torch.int32)
    weights = torch.empty(number.value, dtype=torch.float32)
    offsets = torch.empty(batch * num_heads * target + 1, dtype=torch.int32)
    library().topk_entries(kept, offsets.data_ptr(), columns.data_ptr(), weights.data_ptr())
    show_nan(output, query, key, mask=mask, bias=bias, causal=causal)
    return output.to(value.dtype), columns, weights, offsets, seed


def run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    weights: Tensor,
    offsets: Tensor,
    seed: Tensor,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without one) from the kept entries."""
    q, k, v = _prepared(query, key, value)
    (g,) = _prepared(grad.to(q.dtype))
    grads = [_empty(x, x.shape[3], q.dtype) for x in (query, key, value)]
    grad_scores = torch.empty_like(weights)
    gradients = Gradients()
    entries = {"offsets": offsets, "columns": columns, "weights": weights, "scores": grad_scores}
    _point(gradients, **entries, output=g, query=grads[0], key=grads[1], value=grads[2])
    problem = _problem(q, k, v, causal=causal, dropout=dropout, seed=seed)
    if not library().topk_backward(problem, gradients):
        raise MemoryError("no memory for the gradients of top-k attention")
    grad_bias = query.new_empty(0)
    if bias is not None:
        rows = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        shape = (*query.shape[:3], key.shape[2])
        grad_bias = bias_gradient(grad_scores, bias, shape, rows, columns)
    grad_query, grad_key, grad_value = (
        g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)
    )
    return grad_query, grad_key, grad_value, grad_bias


class _Direct(torch.autograd.Function):
    """The kernels for eager code."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Arguments of ``run_forward``; its output alone."""
        outputs = run_forward(*arguments)
        _keep(ctx, arguments, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments."""
        kept: tuple[Any, ...] = (*ctx.saved_tensors, ctx.causal, ctx.dropout)
        # The operator's gradients refuse to be differentiated, instead of passing for constants.
        run = _backward if torch.is_grad_enabled() else run_backward
        return _gradients(ctx, run(grad, *kept))


# The kernels for compiled code.
_forward = torch.library.custom_op(
    "separata::topk_attention_native",
    run_forward,
    mutates_args=(),
    device_types="cpu",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_backward = torch.library.custom_op(
    "separata::topk_attention_native_backward", run_backward, mutates_args=(), device_types="cpu"
)


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
    batch, num_heads, target, _ = query.shape
    return (
        _empty(query, value.shape[3], value.dtype),
        query.new_empty(entries, dtype=torch.int32),
        query.new_empty(entries, dtype=torch.float32),
        query.new_empty(batch * num_heads * target + 1, dtype=torch.int32),
        query.new_empty(1 if dropout > 0.0 else 0, dtype=torch.long),
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
    seed: Tensor,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (_empty(x, x.shape[3], x.dtype) for x in (query, key, value))
    return query, key, value, query.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, _, bias, ctx.causal, _, ctx.dropout = inputs
    ctx.bias = bias is not None and ctx.needs_input_grad[5]
    ctx.save_for_backward(query, key, value, bias if ctx.bias else None, *output[1:])


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad_bias = grads[3] if ctx.bias else None
    return (*grads[:3], None, None, grad_bias, None, None, None)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _backward(grad, *ctx.saved_tensors, ctx.causal, ctx.dropout))


_forward.register_autograd(_differentiate, setup_context=_keep)


def _prepared(*tensors: Tensor) -> list[Tensor]:
    """In one dtype that the kernels read, bfloat16 or float32, with contiguous widths."""
    dtype = torch.bfloat16
    if any(x.dtype != dtype for x in tensors):
        dtype = torch.float32
    converted = [x.to(dtype) for x in tensors]
    return [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in converted]


def _empty(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Memory for ``(B, H, T, width)``, with times before heads where ``like`` has them so.

    A projection split into heads has; the output then needs no copy to be joined again.
    """
    batch, num_heads, target, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, target, num_heads, width, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, num_heads, target, width, dtype=dtype)


def _problem(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, dropout: float, seed: Tensor
) -> Problem:
    """What forward and backward have in common."""
    batch, num_heads, target, width = query.shape
    problem = Problem(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        target=target,
        source=key.shape[2],
        width=width,
        value_width=value.shape[3],
        causal=causal,
        seed=int(seed) if dropout > 0.0 else 0,
        threads=torch.get_num_threads(),
        level=LEVEL if LEVEL is not None else library().topk_best_level(),
        is_bf16=query.dtype == torch.bfloat16,
        dropout=dropout,
    )
    _point(problem, query=query, key=key, value=value)
    return problem


def _point(structure: ctypes.Structure, **tensors: Tensor) -> None:
    """Set the address of each tensor, and its strides where the structure wants them.

    The caller keeps the tensors alive.
    """
    for name, tensor in tensors.items():
        setattr(structure, name, tensor.data_ptr())
        strides = getattr(structure, f"{name}_stride", None)
        if strides is not None:
            strides[:] = tensor.stride()[: len(strides)]
