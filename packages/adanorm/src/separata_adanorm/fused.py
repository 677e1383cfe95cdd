"""The norms as one operator of PyTorch with a gradient in closed form.

What the forward keeps for the backward is its input and two numbers of each row. An implementation
is a module with ``forward`` and ``backward``: ``closed_form`` in PyTorch, ``native`` in C++ and
``triton``. ``torch.compile`` sees two opaque operators.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import closed_form, native, reference
from .options import Options


def apply(x: Tensor, residual: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """Output and, with a residual, sum of ``norm``, by the shortest way.

    The operator is for graphs. In plain eager code its dispatch costs as much as the norm of a few
    hundred rows.
    """
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor or is_in_torch_dispatch_mode():
        output, total, _ = norm(x, residual, *options)
        return output, total
    if torch.is_grad_enabled():
        results: tuple[Tensor, Tensor | None] = _Direct.apply(x, residual, options)  # type: ignore[no-untyped-call]
        return results
    return _forward(x, residual, options)[:2]


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which takes no operator like ours."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_dynamo_compiling()


def _forward(
    x: Tensor, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None, Tensor]:
    width, C, k, eps, official, _, _, impl = options
    results: tuple[Tensor, Tensor | None, Tensor] = _choose(impl, x, width).forward(
        x, residual, width, C, k, eps, official
    )
    return results


def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, statistics: Tensor, options: Options
) -> Tensor:
    width, C, k, eps, official, detach_mean, detach_std, impl = options
    gradient: Tensor = _choose(impl, x, width).backward(
        grad,
        grad_total,
        x,
        statistics,
        C=C,
        k=k,
        eps=eps,
        official=official,
        detach_mean=detach_mean,
        detach_std=detach_std,
    )
    return gradient


def _choose(impl: str, x: Tensor, width: int) -> ModuleType:
    """The module that normalises ``x``; ``triton`` is imported only where it is wanted.

    Raises:
        ValueError: The named implementation cannot.
    """
    if impl == "eager" or x.numel() == 0:
        return closed_form
    if impl == "native" or (impl == "auto" and x.device.type == "cpu"):
        reason = native.supports(x)
        if reason is None and (impl == "native" or native.available()):
            return native
    elif impl == "triton" or x.device.type == "cuda":
        triton = import_module(".triton", __package__)
        reason = triton.supports(x, width)
        if reason is None:
            return triton
    if impl == "auto":
        return closed_form
    raise ValueError(f"impl {impl!r} cannot serve this call: {reason}")


class _Direct(torch.autograd.Function):
    """``norm`` without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """Normalise; torch is slower where the context is set up in a second function."""
        output, total, statistics = _forward(x, residual, options)
        ctx.set_materialize_grads(False)
        ctx.residual = residual is not None
        ctx.options = options
        ctx.save_for_backward(x if total is None else total, statistics)
        return output, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Differentiate; by the operator where this shall be differentiated again."""
        grad_x = grad_total
        if grad is not None:
            if torch.is_grad_enabled():
                grad_x = norm_backward(grad, grad_total, *ctx.saved_tensors, *ctx.options)
            else:
                x, statistics = ctx.saved_tensors
                grad_x = _backward(grad, grad_total, x, statistics, ctx.options)
        return grad_x, grad_x if ctx.residual else None, None


@torch.library.custom_op("separata::ada_norm", mutates_args=())
def norm(
    x: Tensor,
    residual: Tensor | None,
    width: int,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x``, or its sum with a residual, and scale it by the constant ``C (1 - k y)``.

    ``x`` is ``(..., H)``, or more dimensions that hold rows of ``width`` numbers; the other
    arguments are those of ``Options``.

    Returns:
        Output and sum as ``x`` (no sum without a residual: an empty tensor); mean and standard
        deviation of the rows ``(2, R)``.
    """
    options = Options(width, C, k, eps, official, detach_mean, detach_std, impl)
    output, total, statistics = _forward(x, residual, options)
    return output, x.new_empty(0) if total is None else total, statistics


@norm.register_fake
def _(x: Tensor, residual: Tensor | None, width: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(output)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return output, total, x.new_empty(2, x.numel() // width, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, *ctx.options = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.residual = residual is not None
    ctx.save_for_backward(total if ctx.residual else x, statistics)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_x = grad_total if ctx.residual else None
    if grad is not None:
        grad_x = norm_backward(grad, grad_x, *ctx.saved_tensors, *ctx.options)
    return (grad_x, grad_x if ctx.residual else None, *[None] * len(Options._fields))


norm.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("separata::ada_norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    width: int,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
    impl: str,
) -> Tensor:
    """Gradient of what ``norm`` normalised; arguments as there and in ``closed_form.backward``."""
    options = Options(width, C, k, eps, official, detach_mean, detach_std, impl)
    return _backward(grad, grad_total, x, statistics, options)


@norm_backward.register_fake
def _(grad: Tensor, grad_total: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, x, _, *ctx.options = inputs
    ctx.save_for_backward(grad, x)


def _differentiate_twice(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the gradient: what is detached stays a constant."""
    grad, x = ctx.saved_tensors
    grad, x = reference.differentiate_twice(grad, x, grad_grad, Options(*ctx.options))
    grad_total = grad_grad if ctx.needs_input_grad[1] else None
    return (grad, grad_total, x, None, *[None] * len(Options._fields))


norm_backward.register_autograd(_differentiate_twice, setup_context=_keep_twice)
