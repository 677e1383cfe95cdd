"""The norms as the equations of ``norms.py`` say them; autograd finds the gradient."""

import torch
from torch import Tensor

from .closed_form import computed, spread
from .options import Options


def norm(x: Tensor, options: Options) -> Tensor:
    """Normalise rows of ``x`` and scale them by the constant ``C (1 - k y)``.

    Args:
        x: ``(..., H)``, or more dimensions that hold rows of ``options.width`` numbers.
        options: What the norm is.

    Returns:
        As ``x``.
    """
    width, C, k, eps, official, detach_mean, detach_std, _ = options
    rows = computed(x).reshape(-1, width)
    # In units of a power of two, which loses no digit, squares neither overflow nor vanish.
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    unit = largest.clamp(min=1e-30).log2().floor().exp2()
    rows = rows / unit
    rows = rows - rows[:, :1].detach()  # equal entries deviate by exactly nothing
    mu = rows.mean(dim=1, keepdim=True)  # Eq. 1
    variance = (rows - mu).square().sum(dim=1, keepdim=True) / (width - official)
    # The root has no slope at 0, where the derivative of sigma is taken to be 0.
    sigma = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
    s = spread(sigma * unit, eps, official) / unit  # Eq. 2
    y = (rows - (mu.detach() if detach_mean else mu)) / (s.detach() if detach_std else s)
    phi = C * (1 - k * y.detach())  # Eq. 5
    return (phi * y).to(x.dtype).view(x.shape)  # Eq. 6


def differentiate_twice(
    grad: Tensor, x: Tensor, grad_grad: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(dx * grad_grad)`` where ``dx`` is the gradient of ``norm`` for ``grad``.

    What is detached stays a constant; the results can be differentiated again.

    Returns:
        For ``grad`` and for ``x``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, x = (
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (grad, x)
        )
        output = norm(x, options)
        (dx,) = torch.autograd.grad(output, x, grad, create_graph=True)
        first, second = torch.autograd.grad(
            dx,
            (grad, x),
            grad_grad,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return first, second
