"""The norms of "Understanding and Improving Layer Normalization".

Xu, Sun, Zhang, Zhao, Lin, NeurIPS 2019, arXiv:1911.07013. The equations are numbered here in the
order in which the method needs them; the numbers are ours. ``x (..., H)`` is one row per position,
``sg`` stops the gradient.

    Eq. 1   mu = mean(x),  sigma = std(x)                statistics of a row
    Eq. 2   s = sigma + eps             (official)       sigma with the denominator H - 1
            s = sqrt(sigma^2 + eps)     (torch)          sigma with the denominator H
    Eq. 3   y = (x - mu) / s                             LayerNorm-simple
    Eq. 4   y = (x - sg(mu)) / sg(s)                     DetachNorm; also one of the two alone
    Eq. 5   phi(y) = C (1 - k y)                         the only scaling of its kind with mean C
    Eq. 6   z = sg(phi(y)) y                             AdaNorm
    Eq. 7   z = sg(x) + y                                GradNorm, in the authors' code only

Half precision is normalised in float32 and returned in its own precision, under autocast too.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Convention = Literal["official", "torch"]
"""``official``: authors' code, ``torch``: paper and ``nn.LayerNorm``; see Eq. 2."""

Shape = int | tuple[int, ...] | list[int] | torch.Size
Impl = Literal["auto", "reference"]


def layer_norm_simple(
    x: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """LayerNorm without gain and bias (Eq. 3).

    Args:
        x: ``(..., H)``, any rank.
        eps: Keeps the division finite.
        convention: Which of the two denominators, see Eq. 2.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        ``(..., H)``.
    """
    return detach_norm(
        x,
        eps,
        convention,
        detach_mean=False,
        detach_std=False,
        normalized_shape=normalized_shape,
        impl=impl,
    )


def detach_norm(
    x: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    detach_mean: bool = True,
    detach_std: bool = True,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """LayerNorm-simple whose mean, standard deviation or both are constants of the backward pass.

    Eq. 4. The output is that of ``layer_norm_simple``; with both detached the gradient is
    ``g / s``.

    Args:
        x: ``(..., H)``, any rank.
        eps: Keeps the division finite.
        convention: Which of the two denominators, see Eq. 2.
        detach_mean: Whether the mean is a constant; its derivative re-centres the gradient.
        detach_std: Whether the deviation is a constant; its derivative re-scales the gradient.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        ``(..., H)``.
    """
    width = check_input(x, normalized_shape, convention)
    y = _normalise(x, width, eps, convention, detach_mean, detach_std)
    return y.view(x.shape).to(x.dtype)


def ada_norm(
    x: Tensor,
    C: float = 1.0,
    k: float = 0.1,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """AdaNorm (Eq. 6): ``C (1 - k y) y``, where the first factor is a constant of the backward.

    The gradient is that of ``C y`` re-weighted by ``1 - k y``; it is not the derivative of the
    output, and that is the method. The output is largest at ``y = 1 / (2 k)`` and changes its sign
    at ``y = 1 / k``.

    Args:
        x: ``(..., H)``, any rank.
        C: Mean of the scaling of a row.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        convention: Which of the two denominators, see Eq. 2.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        ``(..., H)``.
    """
    width = check_input(x, normalized_shape, convention)
    y = _normalise(x, width, eps, convention, detach_mean=False, detach_std=False)
    phi = (C * (1 - k * y)).detach()  # Eq. 5
    return (phi * y).view(x.shape).to(x.dtype)  # Eq. 6


def grad_norm(
    x: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The input, with the gradient of LayerNorm-simple (Eq. 7): ``sg(x) + y``.

    Args:
        x: ``(..., H)``, any rank.
        eps: Keeps the division finite.
        convention: Which of the two denominators, see Eq. 2.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        ``(..., H)``.
    """
    y = layer_norm_simple(x, eps, convention, normalized_shape=normalized_shape, impl=impl)
    return x.detach() + y


def clipped_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    fraction: float = 0.005,
    normalized_shape: Shape | None = None,
) -> Tensor:
    """LayerNorm of rows whose extreme entries are clipped, as in the authors' code.

    With ``m = max(int(H fraction), 1)``, the m largest entries of a row become the m-th largest and
    the m smallest the m-th smallest; ``x`` itself stays as it is.

    Args:
        x: ``(..., H)``, any rank.
        weight: Gain ``(H,)``.
        bias: Bias ``(H,)``.
        eps: Added to the variance.
        fraction: Share of the entries to clip on each side, at most one half.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.

    Returns:
        ``(..., H)``.
    """
    if not 0.0 <= fraction <= 0.5:
        raise ValueError(f"fraction must lie between 0 and 0.5, not {fraction}")
    width = check_input(x, normalized_shape, "torch")
    shape = x.shape[-1:] if normalized_shape is None else as_tuple(normalized_shape)
    rows = x.reshape(-1, width)
    count = max(int(width * fraction), 1)
    lowest = rows.topk(count, dim=1, largest=False).values[:, -1:]
    highest = rows.topk(count, dim=1).values[:, -1:]
    clipped = rows.clamp(lowest, highest).view(x.shape)
    return F.layer_norm(clipped, shape, weight, bias, eps)


def _normalise(
    x: Tensor, width: int, eps: float, convention: Convention, detach_mean: bool, detach_std: bool
) -> Tensor:
    """Rows ``y (R, H)`` of Eq. 3 and 4, in float32 or float64."""
    rows = x.reshape(-1, width)
    rows = rows if x.dtype == torch.float64 else rows.float()
    mu = rows.mean(dim=1, keepdim=True)  # Eq. 1
    sigma = rows.std(dim=1, correction=int(convention == "official"), keepdim=True)
    if detach_mean:
        mu = mu.detach()
    if detach_std:
        sigma = sigma.detach()
    if convention == "official":  # Eq. 2
        s = sigma + eps
    else:  # hypot: the square of sigma would overflow
        s = torch.hypot(sigma, sigma.new_tensor(eps).sqrt())
    return (rows - mu) / s


def as_tuple(shape: Shape) -> tuple[int, ...]:
    """The normalised dimensions as a tuple."""
    return (shape,) if isinstance(shape, int) else tuple(shape)


def check_shape(shape: Shape, convention: str) -> tuple[int, ...]:
    """The normalised dimensions, checked.

    Raises:
        ValueError: They are no sizes, or a single entry in the official convention.
    """
    sizes = as_tuple(shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"normalized_shape must hold positive sizes, not {shape!r}")
    if convention not in ("official", "torch"):
        raise ValueError(f"convention must be 'official' or 'torch', not {convention!r}")
    if convention == "official" and max(sizes) == 1:
        raise ValueError(
            "the official convention divides by H - 1, so it cannot normalise H = 1 feature; "
            "use convention='torch'"
        )
    return sizes


def check_input(x: Tensor, shape: Shape | None, convention: str) -> int:
    """Check ``x`` against the normalised dimensions and return ``H``.

    Raises:
        ValueError: They do not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    sizes = check_shape(x.shape[-1:] if shape is None else shape, convention)
    if tuple(x.shape[-len(sizes) :]) != sizes:
        raise ValueError(
            f"the last dimensions of x must be normalized_shape {sizes}, not {tuple(x.shape)}"
        )
    width = 1
    for size in sizes:
        width *= size
    return width


class LayerNormSimple(nn.Module):
    """LayerNorm without gain and bias.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        eps: Keeps the division finite.
        convention: ``"official"`` (authors' code) or ``"torch"`` (``nn.LayerNorm``).
        impl: Implementation.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        *,
        eps: float = 1e-5,
        convention: Convention = "official",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.normalized_shape = check_shape(normalized_shape, convention)
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        return layer_norm_simple(
            x,
            self.eps,
            self.convention,
            normalized_shape=self.normalized_shape,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"{self.normalized_shape}, eps={self.eps}, convention={self.convention!r}"


class DetachNorm(nn.Module):
    """LayerNorm-simple whose statistics are constants of the backward pass.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        detach_mean: Whether the mean is a constant.
        detach_std: Whether the standard deviation is a constant.
        eps: Keeps the division finite.
        convention: ``"official"`` (authors' code) or ``"torch"`` (``nn.LayerNorm``).
        impl: Implementation.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        *,
        detach_mean: bool = True,
        detach_std: bool = True,
        eps: float = 1e-5,
        convention: Convention = "official",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.normalized_shape = check_shape(normalized_shape, convention)
        self.detach_mean = detach_mean
        self.detach_std = detach_std
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        return detach_norm(
            x,
            self.eps,
            self.convention,
            detach_mean=self.detach_mean,
            detach_std=self.detach_std,
            normalized_shape=self.normalized_shape,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Show what is detached when the model is printed."""
        detached = f"detach_mean={self.detach_mean}, detach_std={self.detach_std}"
        return f"{self.normalized_shape}, {detached}, convention={self.convention!r}"


class AdaNorm(nn.Module):
    """LayerNorm-simple scaled by ``C (1 - k y)``, which is a constant of the backward pass.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        C: Mean of the scaling of a row.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        convention: ``"official"`` (authors' code) or ``"torch"`` (``nn.LayerNorm``).
        impl: Implementation.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        *,
        C: float = 1.0,
        k: float = 0.1,
        eps: float = 1e-5,
        convention: Convention = "official",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.normalized_shape = check_shape(normalized_shape, convention)
        self.C = C
        self.k = k
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        return ada_norm(
            x,
            self.C,
            self.k,
            self.eps,
            self.convention,
            normalized_shape=self.normalized_shape,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Show the constants when the model is printed."""
        constants = f"C={self.C}, k={self.k}, eps={self.eps}"
        return f"{self.normalized_shape}, {constants}, convention={self.convention!r}"


class GradNorm(nn.Module):
    """Passes its input on as ``x + y`` and gives it the gradient of LayerNorm-simple.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        eps: Keeps the division finite.
        convention: ``"official"`` (authors' code) or ``"torch"`` (``nn.LayerNorm``).
        impl: Implementation.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        *,
        eps: float = 1e-5,
        convention: Convention = "official",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.normalized_shape = check_shape(normalized_shape, convention)
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., H)`` to the same shape."""
        return grad_norm(
            x,
            self.eps,
            self.convention,
            normalized_shape=self.normalized_shape,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"{self.normalized_shape}, eps={self.eps}, convention={self.convention!r}"


class NoNorm(nn.Module):
    """The input itself, in the place of a norm.

    Args:
        normalized_shape: Taken and ignored, as the other norms need it.
    """

    def __init__(self, normalized_shape: Shape | None = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class ClippedLayerNorm(nn.Module):
    """LayerNorm, with gain and bias, of rows whose extreme entries are clipped.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        fraction: Share of the entries to clip on each side; at least one entry is clipped.
        eps: Added to the variance.
    """

    def __init__(
        self, normalized_shape: Shape, *, fraction: float = 0.005, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.normalized_shape = check_shape(normalized_shape, "torch")
        self.fraction = fraction
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.normalized_shape))
        self.bias = nn.Parameter(torch.zeros(self.normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        return clipped_layer_norm(
            x,
            self.weight,
            self.bias,
            self.eps,
            fraction=self.fraction,
            normalized_shape=self.normalized_shape,
        )

    def extra_repr(self) -> str:
        """Show the sizes when the model is printed."""
        return f"{self.normalized_shape}, fraction={self.fraction}, eps={self.eps}"
