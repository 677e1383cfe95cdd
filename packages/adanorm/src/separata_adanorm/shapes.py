"""The dimensions over which a norm goes."""

import torch
from torch import Tensor

Shape = int | tuple[int, ...] | list[int] | torch.Size
"""Sizes of the last dimensions."""


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


def check_input(x: Tensor, shape: Shape | None, convention: str) -> tuple[int, ...]:
    """Check ``x`` against the normalised dimensions and return them.

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
    return sizes
