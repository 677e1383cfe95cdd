"""What cannot be used is refused by its name, and not used in some way."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from separata_adanorm.monitor import monitor_outliers
from separata_adanorm.norms import (
    AdaNorm,
    ClippedLayerNorm,
    DetachNorm,
    GradNorm,
    LayerNormSimple,
    ada_norm,
    add_ada_norm,
    add_layer_norm_simple,
    clipped_layer_norm,
    detach_norm,
    grad_norm,
    layer_norm_simple,
)
from separata_adanorm.replace import load_layer_norm_checkpoint, replace_norms
from separata_adanorm.statistics import gradient_statistics

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
NO_NUMBERS = (torch.tensor(1.0), torch.nn.Parameter(torch.tensor(1.0)), True, None, "1", [1.0])


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["C", "k", "eps"])
def test_a_constant_that_is_no_number(name: str, value: Any) -> None:
    ada_norm(X, **{name: 1.0})  # what is kept of this call is not for one that looks equal
    kind = type(value).__name__
    norm = AdaNorm(8)
    setattr(norm, name, value)
    add = partial(add_ada_norm, X, X)
    for call in (partial(ada_norm, X), add, partial(AdaNorm, 8), lambda **given: norm(X)):
        with pytest.raises(TypeError, match=f"{name} must be a Python number, not {kind}"):
            call(**{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_an_eps_that_is_no_number(value: Any) -> None:
    functions = (layer_norm_simple, detach_norm, grad_norm, clipped_layer_norm)
    modules = (LayerNormSimple, DetachNorm, GradNorm, ClippedLayerNorm)
    calls: list[Callable[..., Any]] = [*(partial(function, X) for function in functions)]
    calls += [partial(module, 8) for module in modules]
    for call in calls:
        with pytest.raises(TypeError, match="eps must be a Python number"):
            call(eps=value)
    with pytest.raises(TypeError, match="fraction must be a Python number"):
        clipped_layer_norm(X, fraction=value)


@pytest.mark.parametrize("two", [2, np.float32(2), np.float64(2), np.int64(2), Fraction(2)])
def test_any_real_number_is_a_constant(two: Any) -> None:
    assert torch.equal(ada_norm(X, C=two, eps=two), ada_norm(X, C=2.0, eps=2.0))
    assert torch.equal(AdaNorm(8, C=two, k=two)(X), ada_norm(X, C=2.0, k=2.0))


@pytest.mark.parametrize(
    "norm", [ada_norm, layer_norm_simple, detach_norm, grad_norm, clipped_layer_norm]
)
def test_lists_and_arrays_are_no_tensors(norm: Callable[..., Any]) -> None:
    for value in (X.tolist(), X.numpy(), None):
        with pytest.raises(TypeError, match=f"x must be a tensor, not {type(value).__name__}"):
            norm(value)


@pytest.mark.parametrize("add", [add_ada_norm, add_layer_norm_simple])
def test_a_residual_is_a_tensor(add: Callable[..., Any]) -> None:
    for value in (None, X.tolist(), 0.0):
        kind = type(value).__name__
        with pytest.raises(TypeError, match=f"residual must be a tensor, not {kind}"):
            add(X, value)
        with pytest.raises(TypeError, match=f"x must be a tensor, not {kind}"):
            add(value, X)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gain_and_bias_of_the_clipped_norm_have_its_shape(name: str) -> None:
    for size in ((7,), (2, 8), (1,), ()):
        with pytest.raises(ValueError, match=rf"{name} must have the shape .* \(8,\), not \("):
            clipped_layer_norm(X, **{name: torch.ones(size)})
    with pytest.raises(TypeError, match=f"{name} must be a tensor, not list"):
        clipped_layer_norm(X, **{name: [1.0] * 8})


def test_what_is_no_model() -> None:
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda model: replace_norms(model, "ada_norm"),
        lambda model: load_layer_norm_checkpoint(model, {}),
        lambda model: gradient_statistics(model, X.sum),
        lambda model: monitor_outliers(model).__enter__(),
    )
    for call in calls:
        for model in (3, torch.nn.LayerNorm, [torch.nn.LayerNorm(8)]):
            kind = type(model).__name__
            with pytest.raises(TypeError, match=rf"model must be an nn\.Module, not {kind}"):
                call(model)
