"""From the name of a norm in a configuration to the function that makes it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from .norms import (
    AdaNorm,
    ClippedLayerNorm,
    DetachNorm,
    GradNorm,
    LayerNormSimple,
    NoNorm,
)
from .options import Convention, Impl

NormKind = Literal[
    "layer_norm",
    "layer_norm_simple",
    "detach_norm",
    "detach_mean",
    "detach_std",
    "ada_norm",
    "grad_norm",
    "no_norm",
    "clipped",
]
"""``layer_norm`` is torch's, with gain and bias; ``clipped`` is that of rows without extremes."""


def check_norm(group: str, *, C: float, name: str = "width", width: int) -> None:
    """Check what a configuration says of its norms.

    Args:
        group: Name of the group of settings.
        C: Its constant of AdaNorm.
        name: Name of its width that is normalised.
        width: That width.

    Raises:
        ValueError: C is not a positive number, or a single feature would be normalised.
    """
    if not math.isfinite(C) or C <= 0:
        raise ValueError(f"{group}.C: must be a positive number, got {C}")
    if width < 2:
        raise ValueError(f"{group}.{name}: must be at least 2 to be normalised, got {width}")


def norm_factory(
    kind: str,
    *,
    C: float = 1.0,
    k: float = 0.1,
    eps: float = 1e-5,
    convention: Convention = "official",
    fraction: float = 0.005,
    impl: Impl = "auto",
) -> Callable[[int], nn.Module]:
    """The function that makes norms of one kind for a width.

    Args:
        kind: One of ``NormKind``.
        C: Mean of the scaling of AdaNorm.
        k: Slope of the scaling of AdaNorm.
        eps: Keeps the division finite.
        convention: ``"official"`` or ``"torch"``; ``layer_norm`` and ``clipped`` are torch's.
        fraction: Share of the entries that ``clipped`` clips on each side.
        impl: Implementation.

    Raises:
        ValueError: There is no such kind.
    """
    options: dict[str, Any] = {"eps": eps, "convention": convention, "impl": impl}
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "layer_norm": partial(nn.LayerNorm, eps=eps),
        "layer_norm_simple": partial(LayerNormSimple, **options),
        "detach_norm": partial(DetachNorm, **options),
        "detach_mean": partial(DetachNorm, detach_std=False, **options),
        "detach_std": partial(DetachNorm, detach_mean=False, **options),
        "ada_norm": partial(AdaNorm, C=C, k=k, **options),
        "grad_norm": partial(GradNorm, **options),
        "no_norm": NoNorm,
        "clipped": partial(ClippedLayerNorm, fraction=fraction, eps=eps),
    }
    if kind not in kinds:
        raise ValueError(f"norm must be one of {', '.join(get_args(NormKind))}, not {kind!r}")
    return kinds[kind]
