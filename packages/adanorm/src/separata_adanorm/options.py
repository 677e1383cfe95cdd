"""What a norm is, and over which dimensions it goes."""

from collections.abc import Iterable
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

Shape = int | tuple[int, ...] | list[int] | torch.Size
"""Sizes of the last dimensions."""


class Options(NamedTuple):
    """What a norm is, besides its input."""

    width: int
    """Numbers of a row, ``H``."""

    C: float
    """Mean of the scaling."""

    k: float
    """Slope of the scaling."""

    eps: float
    """Keeps the division finite."""

    official: bool
    """Whether the convention is the official one."""

    detach_mean: bool
    """Whether the mean is a constant of the backward pass."""

    detach_std: bool
    """Whether the deviation is a constant of the backward pass."""

    impl: str
    """Name of the implementation."""


def as_tuple(shape: Shape) -> tuple[int, ...]:
    """The normalised dimensions as a tuple.

    Raises:
        ValueError: They are neither an integer nor several.
    """
    try:
        return tuple(map(index, shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        raise ValueError(
            f"normalized_shape must be one integer or several, not {shape!r}"
        ) from None


def check_shape(shape: Shape, convention: str) -> tuple[int, ...]:
    """The normalised dimensions, checked.

    Raises:
        ValueError: They are no sizes, or a single entry in the official convention.
    """
    sizes = as_tuple(shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"normalized_shape must hold positive sizes, not {sizes}")
    if convention not in ("official", "torch"):
        raise ValueError(f"convention must be 'official' or 'torch', not {convention!r}")
    if convention == "official" and max(sizes) == 1:
        raise ValueError(
            "the official convention divides by H - 1, so it cannot normalise H = 1 feature; "
            "use convention='torch'"
        )
    return sizes


def check_eps(eps: float) -> None:
    """Check what keeps the division finite.

    Raises:
        ValueError: It is negative or no number.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, but is {eps}")


def check_input(x: Tensor, sizes: tuple[int, ...]) -> None:
    """Check ``x`` against the normalised dimensions.

    Raises:
        ValueError: They do not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, not {x.dtype}")
    if x.shape[-len(sizes) :] != sizes:
        raise ValueError(
            f"the last dimensions of x must be normalized_shape {sizes}, not {tuple(x.shape)}"
        )
