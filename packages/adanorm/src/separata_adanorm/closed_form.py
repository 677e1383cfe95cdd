"""The norms and their gradients as formulas, in PyTorch; runs on any device and in any precision.

With ``y = (x - mu) / s`` and ``h = g (C - C k y)``, the gradient of a row is

    dx = (h - mean(h) - y sum(h y) r) / s

with ``r = s / ((H - 1) sigma)`` in the official convention and ``1 / H`` in that of torch. A mean
that is detached leaves out the second term, a deviation that is detached the third.
"""

import torch
from torch import Tensor


def forward(
    x: Tensor, residual: Tensor | None, width: int, C: float, k: float, eps: float, official: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalise rows of ``x + residual``.

    Args:
        x: ``(..., H)`` or more dimensions that hold rows of ``width`` numbers.
        residual: As ``x``, or None.
        width: ``H``.
        C: Mean of the scaling.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        official: Whether the convention is the official one.

    Returns:
        Output and sum as ``x`` (None without a residual); mean and standard deviation of the rows
        ``(2, R)``.
    """
    total = x if residual is None else x + residual
    rows = computed(total).reshape(-1, width)
    wide = rows.dtype if rows.device.type == "mps" else torch.float64  # sums may overflow
    # Differences to the first entry: equal entries then deviate by exactly nothing. Half of them,
    # for that of the largest numbers overflows.
    differences = torch.add(rows[:, :1] / -2, rows, alpha=0.5).mean(dim=1, dtype=wide)
    mean = (rows[:, 0] + 2 * differences).to(rows.dtype)
    deviations = rows - mean[:, None]
    sigma = torch.linalg.vector_norm(deviations, dim=1, dtype=wide) / (width - official) ** 0.5
    sigma = sigma.to(rows.dtype)
    y = deviations / spread(sigma, eps, official)[:, None]
    output = (y * (C - C * k * y)).to(x.dtype).view(x.shape)
    statistics = torch.stack([mean, sigma])
    return output, None if residual is None else total.contiguous(), statistics


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    *,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
) -> Tensor:
    """Gradient of the input from that of the output.

    Args:
        grad: Gradient of the output, as ``x``.
        grad_total: Gradient of the sum, or None.
        x: What was normalised: the input, or its sum with the residual.
        statistics: Mean and standard deviation of the rows ``(2, R)``.
        C: Mean of the scaling.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        official: Whether the convention is the official one.
        detach_mean: Whether the mean is a constant.
        detach_std: Whether the deviation is a constant.

    Returns:
        As ``x``.
    """
    mean, sigma = statistics[..., None]
    width = x.numel() // max(len(mean), 1)
    rows = computed(x).reshape(len(mean), width)
    s = spread(sigma, eps, official)
    y = (rows - mean) / s
    h = computed(grad).reshape(rows.shape) * (C - C * k * y)
    dx: Tensor = h
    if not detach_mean:
        dx = dx - h.mean(dim=1, keepdim=True)
    if not detach_std:
        products = (h * y).sum(dim=1, keepdim=True)
        if official:  # divided by sigma first: both vanish together
            shrink = torch.where(sigma > 0, products / sigma * (s / (width - 1)), 0)
        else:
            shrink = products / width
        dx = dx - y * shrink
    dx = (dx / s).view(x.shape)
    if grad_total is not None:
        dx = dx + grad_total
    return dx.to(x.dtype)


def spread(sigma: Tensor, eps: float, official: bool) -> Tensor:
    """What a row is divided by: ``sigma + eps`` or ``sqrt(sigma^2 + eps)``."""
    # The square of a large sigma would overflow.
    return sigma + eps if official else torch.hypot(sigma, sigma.new_tensor(eps**0.5))


def computed(x: Tensor) -> Tensor:
    """In the precision of the computation: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()
