"""The norms as one operator of PyTorch with a gradient in closed form.

What the forward keeps for the backward is its input and two numbers of each row. An implementation
is a module with ``forward`` and ``backward``: ``closed_form`` in PyTorch, ``native`` in C++ and
``triton``. ``torch.compile`` sees two opaque operators.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import closed_form, native, reference


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise ``x``, or its sum with a residual, and scale it by the constant ``C (1 - k y)``.

    Args:
        x: ``(..., H)`` or more dimensions that hold rows of ``width`` numbers.
        residual: As ``x``, or None.
        width: ``H``.
        C: Mean of the scaling.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        official: Whether the convention is the official one.
        detach_mean: Whether the mean is a constant of the backward pass.
        detach_std: Whether the deviation is a constant of the backward pass.
        impl: Name of the implementation.

    Returns:
        Output and sum as ``x`` (no sum without a residual: an empty tensor), mean and standard
        deviation of the rows ``(R,)``.
    """
    chosen = _choose(impl, x, width)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = chosen.forward(
        x, residual, width, C, k, eps, official
    )
    return results


norm = torch.library.custom_op("separata::ada_norm", forward, mutates_args=())


def apply(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and sum of ``norm``, by the shortest way; the gradient is the same.

    The operator is for graphs. In plain eager code its dispatch costs as much as the norm of a few
    hundred rows.
    """
    run: Callable[..., Any] = forward
    if torch.compiler.is_compiling() or type(x) is not Tensor or is_in_torch_dispatch_mode():
        run = norm
    elif torch.is_grad_enabled():
        run = _Direct.apply
    output, total, _, _ = run(x, *arguments)
    return output, total


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which takes no operator like ours."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, width: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(output)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, sigma = (x.new_empty(x.numel() // width, dtype=dtype) for _ in range(2))
    return output, total, mean, sigma


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    mean: Tensor,
    sigma: Tensor,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
    impl: str,
) -> Tensor:
    """Gradient of what ``norm`` normalised; arguments as there and in ``closed_form.backward``."""
    width = x.numel() // max(len(mean), 1)
    gradient: Tensor = _choose(impl, x, width).backward(
        grad,
        grad_total,
        x,
        mean,
        sigma,
        C=C,
        k=k,
        eps=eps,
        official=official,
        detach_mean=detach_mean,
        detach_std=detach_std,
    )
    return gradient


norm_backward = torch.library.custom_op("separata::ada_norm_backward", backward, mutates_args=())


@norm_backward.register_fake
def _(grad: Tensor, grad_total: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, _, *ctx.options = inputs
    _, total, mean, sigma = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, sigma)
    ctx.residual = residual is not None
    ctx.save_for_backward(total if ctx.residual else x, mean, sigma)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_x = grad_total if ctx.residual else None
    if grad is not None:
        grad_x = norm_backward(grad, grad_x, *ctx.saved_tensors, *ctx.options)
    return (grad_x, grad_x if ctx.residual else None, *[None] * 8)


norm.register_autograd(_differentiate, setup_context=_keep)


class _Direct(torch.autograd.Function):
    """``norm`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """As the operator; torch is slower where the context is set up in a second function."""
        results = forward(*arguments)
        _keep(ctx, arguments, results)
        return results

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """As ``_differentiate``, which is differentiable itself."""
        if grad is None or torch.is_grad_enabled():
            return _differentiate(ctx, grad, grad_total)
        grad_total = grad_total if ctx.residual else None
        grad_x = backward(grad, grad_total, *ctx.saved_tensors, *ctx.options)
        return (grad_x, grad_x if ctx.residual else None, *[None] * 8)


def _keep_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, x, mean, _, *ctx.options, _ = inputs
    ctx.rows = len(mean)
    ctx.save_for_backward(grad, x)


def _differentiate_twice(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    names = ("C", "k", "eps", "official", "detach_mean", "detach_std")
    options = dict(zip(names, ctx.options, strict=True))
    width = x.numel() // max(ctx.rows, 1)
    grad, x = reference.differentiate_twice(grad, x, grad_grad, width, **options)
    return (grad, grad_grad if ctx.needs_input_grad[1] else None, x, *[None] * 9)


norm_backward.register_autograd(_differentiate_twice, setup_context=_keep_twice)
