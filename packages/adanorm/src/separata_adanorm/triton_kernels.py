"""The kernels of ``triton.py``: a row stays in the registers of one program."""

# Arguments of kernels have no Python types, and capitals are constants of compilation:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# mypy: disable-error-code="import-not-found, import-untyped"
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def spread(sigma, eps, OFFICIAL: tl.constexpr):
    """What a row is divided by."""
    if OFFICIAL:
        return sigma + eps
    # beyond that eps is nothing, and the square would overflow
    return tl.where(sigma > 1e18, sigma, tl.sqrt(sigma * sigma + eps))


@triton.jit
def forward_kernel(
    x,
    residual,
    output,
    total,
    means,
    sigmas,
    width,
    C,
    k,
    eps,
    OFFICIAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width + columns
    v = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    if RESIDUAL:
        v += tl.load(residual + place, mask=inside, other=0).to(tl.float32)
        v = v.to(total.dtype.element_ty)
        tl.store(total + place, v, mask=inside)
        v = v.to(tl.float32)
    # Equal entries then deviate by exactly nothing, and a mean that was rounded is corrected.
    first = tl.sum(tl.where(columns == 0, v, 0), axis=0)
    mean = first + tl.sum(tl.where(inside, v - first, 0), axis=0) / width
    mean += tl.sum(tl.where(inside, v - mean, 0), axis=0) / width
    c = tl.where(inside, v - mean, 0)
    # Squares of the shares of the largest deviation cannot overflow.
    largest = tl.maximum(tl.max(tl.abs(c), axis=0), 1e-30)
    share = c / largest
    denominator = width - 1 if OFFICIAL else width
    sigma = largest * tl.sqrt(tl.sum(share * share, axis=0) / denominator)
    y = c / spread(sigma, eps, OFFICIAL)
    z = y * (C - C * k * y)
    tl.store(output + place, z.to(output.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(sigmas + row, sigma)


@triton.jit
def backward_kernel(
    grad,
    grad_total,
    x,
    means,
    sigmas,
    output,
    width,
    C,
    k,
    eps,
    OFFICIAL: tl.constexpr,
    DETACH_MEAN: tl.constexpr,
    DETACH_STD: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one row; the formula is that of ``closed_form.py``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = row * width + columns
    mean, sigma = tl.load(means + row), tl.load(sigmas + row)
    s = spread(sigma, eps, OFFICIAL)
    v = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    y = tl.where(inside, v - mean, 0) / s
    h = tl.load(grad + place, mask=inside, other=0).to(tl.float32) * (C - C * k * y)
    dx = h
    if not DETACH_MEAN:
        # Nothing is left of a single entry; a fused multiply-add would leave its rounding.
        dx = tl.where(width > 1, dx - tl.sum(h, axis=0) / width, 0)
    if not DETACH_STD:
        products = tl.sum(h * y, axis=0)
        if OFFICIAL:
            shrink = tl.where(sigma > 0, products / tl.maximum(sigma, 1e-37) * (s / (width - 1)), 0)
        else:
            shrink = products / width
        dx -= y * shrink
    dx /= s
    if RESIDUAL:
        dx += tl.load(grad_total + place, mask=inside, other=0).to(tl.float32)
    tl.store(output + place, dx.to(output.dtype.element_ty), mask=inside)
