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

``reference.py`` spells them out, ``fused.py`` holds the fast forms. The statistics of half
precision are computed in float32 and the result has the precision of the input, under autocast too.
The derivative of a gradient is that of the graph with what is detached held constant.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fused
from . import reference as spelled_out
from .options import (
    Convention,
    Impl,
    Shape,
    as_tuple,
    check_eps,
    check_input,
    check_numbers,
    check_parameters,
    check_shape,
    check_tensors,
    kept_options,
    make_options,
)


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
        C: Mean of the scaling of a row; a number, for it gets no gradient.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        convention: Which standard deviation, see Eq. 2.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        As ``x``.

    Raises:
        ValueError: A size or a constant is none that the norm can have; the message names it.
        TypeError: A constant is no number, or ``x`` is no tensor.
    """
    return _norm(x, None, normalized_shape, C, k, eps, convention, impl)[0]


def layer_norm_simple(
    x: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """LayerNorm without gain and bias (Eq. 3); arguments as in ``ada_norm``."""
    return _norm(x, None, normalized_shape, 1.0, 0.0, eps, convention, impl)[0]


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
    """LayerNorm-simple with mean, deviation or both as constants of the backward pass (Eq. 4).

    The output is that of ``layer_norm_simple``; with both detached the gradient is ``g / s``.

    Args:
        x: ``(..., H)``, any rank.
        eps: Keeps the division finite.
        convention: Which standard deviation, see Eq. 2.
        detach_mean: Whether the mean is a constant; its derivative re-centres the gradient.
        detach_std: Whether the deviation is a constant; its derivative shrinks the gradient.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        As ``x``.
    """
    detach = (detach_mean, detach_std)
    return _norm(x, None, normalized_shape, 1.0, 0.0, eps, convention, impl, detach)[0]


def grad_norm(
    x: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``sg(x) + y`` with the gradient of LayerNorm-simple (Eq. 7); arguments as in ``ada_norm``."""
    y = layer_norm_simple(x, eps, convention, normalized_shape=normalized_shape, impl=impl)
    return x.detach() + y


def add_ada_norm(
    x: Tensor,
    residual: Tensor,
    C: float = 1.0,
    k: float = 0.1,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + residual`` and its AdaNorm, in one pass over memory.

    Args:
        x: ``(..., H)``, any rank.
        residual: Of the shape and precision of ``x``.
        C: Mean of the scaling of a row.
        k: Slope of the scaling.
        eps: Keeps the division finite.
        convention: Which standard deviation, see Eq. 2.
        normalized_shape: The last dimensions, over which to normalise; by default the last one.
        impl: Implementation.

    Returns:
        The sum and the norm of it, each as ``x``.
    """
    check_tensors(residual=residual)
    normed, total = _norm(x, residual, normalized_shape, C, k, eps, convention, impl)
    assert total is not None
    return total, normed


def add_layer_norm_simple(
    x: Tensor,
    residual: Tensor,
    eps: float = 1e-5,
    convention: Convention = "official",
    *,
    normalized_shape: Shape | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + residual`` and its LayerNorm-simple; arguments and results as in ``add_ada_norm``."""
    check_tensors(residual=residual)
    normed, total = _norm(x, residual, normalized_shape, 1.0, 0.0, eps, convention, impl)
    assert total is not None
    return total, normed


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
    check_tensors(x=x)
    sizes = x.shape[-1:] if normalized_shape is None else normalized_shape
    shape = _check_clipped(sizes, eps, fraction)
    check_input(x, shape)
    check_parameters(shape, weight=weight, bias=bias)
    width = math.prod(shape)
    rows = x.reshape(-1, width)
    count = max(int(width * fraction), 1)
    lowest = rows.topk(count, dim=1, largest=False).values[:, -1:]
    highest = rows.topk(count, dim=1).values[:, -1:]
    clipped = rows.clamp(lowest, highest).view(x.shape)
    return F.layer_norm(clipped, shape, weight, bias, eps)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    shape: Shape | None,
    C: float,
    k: float,
    eps: float,
    convention: Convention,
    impl: Impl,
    detach: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor | None]:
    """Norm and, with a residual, sum; ``detach`` says whether mean and deviation are constants."""
    check_tensors(x=x)
    sizes = tuple(x.shape[-1:]) if shape is None else as_tuple(shape)
    if not type(C) is type(k) is type(eps) is float:
        # What is kept is looked up by its hash: that of a tensor is not that of its value.
        check_numbers(C=C, k=k, eps=eps)
    make = make_options if torch.compiler.is_dynamo_compiling() else kept_options
    options = make(sizes, C, k, eps, convention, impl, detach)
    check_input(x, sizes)
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must have the shape and precision of x, {tuple(x.shape)} and {x.dtype}, "
            f"not {tuple(residual.shape)} and {residual.dtype}"
        )
    if impl == "reference" or (impl == "auto" and fused.is_transformed()):
        total = x if residual is None else x + residual
        return spelled_out.norm(total, options), total
    return fused.apply(x, residual, options)


def _check(
    shape: Shape, eps: float, convention: Convention, impl: Impl, C: float = 1.0, k: float = 0.0
) -> tuple[int, ...]:
    """The sizes of a module; what its forward would refuse is refused when it is made."""
    sizes = as_tuple(shape)
    check_numbers(C=C, k=k, eps=eps)
    make_options(sizes, C, k, eps, convention, impl, (False, False))
    return sizes


def _check_clipped(shape: Shape, eps: float, fraction: float) -> tuple[int, ...]:
    check_numbers(eps=eps, fraction=fraction)
    if not 0.0 <= fraction <= 0.5:
        raise ValueError(f"fraction must lie between 0 and 0.5, not {fraction}")
    check_eps(eps)
    return check_shape(shape, "torch")


class LayerNormSimple(nn.Module):
    """LayerNorm without gain and bias.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        eps: Keeps the division finite.
        convention: ``"official"`` (authors' code) or ``"torch"`` (``nn.LayerNorm``).
        impl: Implementation.

    Raises:
        ValueError: A size or a constant is none that the norm can have.
        TypeError: A constant is no number.
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
        self.normalized_shape = _check(normalized_shape, eps, convention, impl)
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        constants = (1.0, 0.0, self.eps, self.convention, self.impl)
        return _norm(x, None, self.normalized_shape, *constants)[0]

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

    Raises:
        ValueError: A size or a constant is none that the norm can have.
        TypeError: A constant is no number.
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
        self.normalized_shape = _check(normalized_shape, eps, convention, impl)
        self.detach_mean = detach_mean
        self.detach_std = detach_std
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        constants = (1.0, 0.0, self.eps, self.convention, self.impl)
        detach = (self.detach_mean, self.detach_std)
        return _norm(x, None, self.normalized_shape, *constants, detach)[0]

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

    Raises:
        ValueError: A size or a constant is none that the norm can have.
        TypeError: A constant is no number.
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
        self.normalized_shape = _check(normalized_shape, eps, convention, impl, C, k)
        self.C = C
        self.k = k
        self.eps = eps
        self.convention: Convention = convention
        self.impl: Impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (..., H)``."""
        constants = (self.C, self.k, self.eps, self.convention, self.impl)
        return _norm(x, None, self.normalized_shape, *constants)[0]

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

    Raises:
        ValueError: A size or a constant is none that the norm can have.
        TypeError: A constant is no number.
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
        self.normalized_shape = _check(normalized_shape, eps, convention, impl)
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
        normalized_shape: Kept for who replaces it; the input may have any shape.
    """

    def __init__(self, normalized_shape: Shape | None = None) -> None:
        super().__init__()
        self.normalized_shape = (
            None if normalized_shape is None else check_shape(normalized_shape, "torch")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class ClippedLayerNorm(nn.Module):
    """LayerNorm, with gain and bias, of rows whose extreme entries are clipped.

    Args:
        normalized_shape: The last dimensions, over which to normalise.
        fraction: Share of the entries to clip on each side; at least one entry is clipped.
        eps: Added to the variance.

    Raises:
        ValueError: A size, the fraction or eps is none that the norm can have.
    """

    def __init__(
        self, normalized_shape: Shape, *, fraction: float = 0.005, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.normalized_shape = _check_clipped(normalized_shape, eps, fraction)
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
