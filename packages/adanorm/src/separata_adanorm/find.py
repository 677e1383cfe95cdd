"""The norms of anybody's model."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold import Affine
from .norms import (
    AdaNorm,
    ClippedLayerNorm,
    DetachNorm,
    GradNorm,
    LayerNormSimple,
    NoNorm,
    layer_norm_simple,
)

OURS = (AdaNorm, LayerNormSimple, DetachNorm, GradNorm, NoNorm, ClippedLayerNorm)

_NORM_CLASS = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
_BEFORE_THE_LAYERS = re.compile(r"emb|pre")


def check_model(model: nn.Module) -> None:
    """Check that something can have norms.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def norm_modules(model: nn.Module) -> dict[str, list[str]]:
    """Names of everything that looks like a norm over the last dimension.

    That is an ``nn.LayerNorm``, one of this package's norms, or a module without children whose
    class is called LayerNorm or RMSNorm in some spelling.

    Returns:
        First name of each module to all its names.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model)
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = isinstance(module, (nn.LayerNorm, *OURS))
        if known or (_NORM_CLASS.search(type(module).__name__) and not list(module.children())):
            found.setdefault(id(module), []).append(name)
    return {names[0]: names for names in found.values()}


def layer_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Those of ``norm_modules`` that compute layer normalisation, by their first name."""
    modules = {name: model.get_submodule(name) for name in norm_modules(model)}
    return {name: norm for name, norm in modules.items() if objection(norm) is None}


def shape_of(norm: nn.Module) -> tuple[int, ...]:
    """Shape that a norm normalises; empty if it does not say."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is None:
        weight = getattr(norm, "weight", None)
        shape = () if weight is None else weight.shape
    return (shape,) if isinstance(shape, int) else tuple(shape)


def affine_of(norm: nn.Module) -> Affine:
    """Gain and bias of a norm."""
    return Affine(getattr(norm, "weight", None), getattr(norm, "bias", None))


def epsilon_of(norm: nn.Module) -> float:
    """The eps of a norm; torch's default if it does not say."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(value := getattr(norm, name, None), float | int):
            return value
    return 1e-5


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The normalised features y, before any gain, of the input ``x (..., H)`` of ``norm``."""
    return layer_norm_simple(
        x,
        epsilon_of(norm),
        getattr(norm, "convention", "torch"),
        normalized_shape=shape_of(norm) or None,
    )


@torch.no_grad()
def objection(norm: nn.Module) -> str | None:
    """Why a module does not stand for a layer norm; None if it does.

    A foreign class is not believed its name: it is called on random numbers and must give what
    ``F.layer_norm`` gives.
    """
    if type(norm) in (nn.LayerNorm, *OURS):
        return None
    kind = type(norm).__name__
    shape, affine = shape_of(norm), affine_of(norm)
    if not shape:
        return f"{kind} does not say its width"
    parameter = next(norm.parameters(), torch.empty(0))
    if parameter.is_meta:
        return f"{kind} cannot be tried while its parameters are not in memory"
    x = torch.randn((3, 5, *shape), generator=torch.Generator().manual_seed(0))
    x = (2 * x + 1).to(parameter)
    try:
        output = norm.forward(x)  # not called, for hooks are not for this
        expected = F.layer_norm(x, shape, affine.gain, affine.bias, epsilon_of(norm))
        same = torch.allclose(output, expected, rtol=1e-2, atol=1e-2)
    except Exception:  # whatever a foreign module raises, it is no layer norm
        same = False
    return None if same else f"{kind} does not normalise the last dimension as LayerNorm does"


def is_final(model: nn.Module, name: str) -> bool:
    """Whether a norm stands behind a stack of layers: beside it, not in it and not before it."""
    parent, _, own = name.rpartition(".")
    holders = [model]
    for part in parent.split(".") if parent else ():
        module = holders[-1].get_submodule(part)
        if isinstance(holders[-1], nn.ModuleList | nn.Sequential) and norm_modules(module):
            return False  # inside a layer
        holders.append(module)
    return _has_stack(holders[-1]) and not _BEFORE_THE_LAYERS.search(own.lower())


def _has_stack(parent: nn.Module) -> bool:
    """Whether layers with norms are listed somewhere in ``parent``."""
    return any(
        list(layer.children()) and norm_modules(layer)
        for stack in parent.modules()
        if isinstance(stack, nn.ModuleList | nn.Sequential)
        for layer in stack
    )
