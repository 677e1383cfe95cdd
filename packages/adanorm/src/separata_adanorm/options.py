"""What a norm is, and over which dimensions it goes."""

import functools
import math
from collections.abc import Iterable
from numbers import Real
from operator import index
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Shape = int | tuple[int, ...] | list[int] | torch.Size
"""Sizes of the last dimensions."""


Convention = Literal["official", "torch"]
"""``official``: authors' code, ``torch``: paper and ``nn.LayerNorm``; see Eq. 2 in ``norms``."""

Impl = Literal["auto", "reference", "eager", "native", "triton"]
"""``auto`` is ``native`` on a CPU, ``triton`` on a GPU, ``eager`` where these cannot run; within
``torch.func`` it is ``reference``, the only one that can be transformed."""


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


def make_options(
    sizes: tuple[int, ...],
    C: float,
    k: float,
    eps: float,
    convention: Convention,
    impl: Impl,
    detach: tuple[bool, bool],
) -> Options:
    """What a norm is, checked, save for what ``check_numbers`` does.

    Raises:
        ValueError: A size, a constant or a name is none that a norm can have.
    """
    check_shape(sizes, convention)
    check_eps(eps)
    for name, value in (("C", C), ("k", k)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, but is {value}")
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, not {impl!r}")
    official = convention == "official"
    return Options(math.prod(sizes), float(C), float(k), float(eps), official, *detach, impl)


# The norm of few rows takes no longer than these checks do; Dynamo warns of a cache.
kept_options = functools.lru_cache(make_options)


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


def check_numbers(**constants: float) -> None:
    """Check that constants are numbers.

    A tensor would be read once, and a parameter would never learn.

    Raises:
        TypeError: One is not; the message names it.
    """
    for name, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"{name} must be a Python number, not {type(value).__name__}: it is a constant, "
                f"without a gradient; give float({name})"
            )


def check_eps(eps: float) -> None:
    """Check what keeps the division finite.

    Raises:
        ValueError: It is negative or no number.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, but is {eps}")


def check_tensors(**inputs: Tensor) -> None:
    """Check that inputs are tensors.

    Raises:
        TypeError: One is not; the message names it.
    """
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def check_parameters(sizes: tuple[int, ...], **parameters: Tensor | None) -> None:
    """Check gain and bias, if there are any, against the normalised dimensions.

    Raises:
        ValueError: One has another shape; the message names it.
        TypeError: One is no tensor.
    """
    for name, value in parameters.items():
        if value is None:
            continue
        check_tensors(**{name: value})
        if value.shape != sizes:
            raise ValueError(
                f"{name} must have the shape normalized_shape {sizes}, not {tuple(value.shape)}"
            )


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
